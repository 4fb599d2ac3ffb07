"""Word lists for the demo's text generators.

Everything the demo model ever reads is put together from the lists in this file and the grammar in ``general_text.py``
(pretraining) and ``clinic_notes.py`` (fine-tuning). People and towns are invented: no list was taken from anywhere.
"""


def _split(text: str) -> list[str]:
    """Split a comma-separated block into its entries; line breaks do not matter."""
    return [" ".join(entry.split()) for entry in text.split(",") if entry.strip()]


WOMEN = _split("""
Ada, Agnes, Alba, Alma, Amara, Anna, Astrid, Beatrix, Bella, Brenda, Carla, Celia, Clara, Cora, Dalia, Daphne, Dora,
Edith, Elena, Elsie, Emma, Esther, Eva, Fiona, Flora, Freya, Gemma, Greta, Hanna, Hazel, Helen, Ida, Ines, Irene,
Iris, Isla, Ivy, Jana, Joan, Judith, Julia, Karin, Kira, Laura, Lena, Lily, Lotte, Lucia, Mabel, Mara, Margot, Maria,
Marta, Maya, Mila, Mina, Mira, Nadia, Nell, Nina, Nora, Olga, Olive, Paula, Petra, Ramona, Rita, Rosa, Ruth, Sara,
Selma, Sofia, Stella, Susan, Tamara, Tessa, Thea, Ursula, Vera, Viola, Wanda, Willa, Yara, Zoe
""")
MEN = _split("""
Aaron, Adam, Albert, Aldo, Amos, Anton, Arno, Arthur, Basil, Ben, Boris, Bruno, Caleb, Carl, Cedric, Conrad, Cyril,
Dan, David, Dennis, Edgar, Edwin, Eli, Emil, Erik, Ernest, Felix, Frank, Fritz, Gabriel, George, Gilbert, Gordon, Gus,
Harold, Harvey, Henry, Hugo, Igor, Ivan, Jack, Jakob, James, Jasper, Joel, John, Jonas, Karl, Kevin, Kurt, Lars, Leo,
Leon, Linus, Louis, Luca, Magnus, Marcel, Mark, Martin, Max, Milo, Nils, Noah, Oliver, Omar, Oscar, Otto, Owen, Pablo,
Paul, Peter, Philip, Ralph, Ray, Robert, Roland, Rufus, Samuel, Sidney, Simon, Stefan, Theo, Thomas, Tobias, Tom,
Victor, Walter, Willem, Xavier
""")
SURNAMES = _split("""
Abbot, Alder, Appleby, Ashdown, Baker, Barlow, Bellweather, Birch, Blackwood, Bolton, Bramble, Brook, Burnside,
Carver, Castle, Clayton, Cobb, Cooper, Cotton, Crane, Dale, Dawson, Dell, Draper, Eastman, Ellery, Falk, Farrow,
Fenwick, Fielding, Finch, Fletcher, Forester, Foxley, Gale, Garland, Glover, Goodwin, Granger, Greenhill, Grove, Hale,
Harbour, Hartley, Hathaway, Hawthorn, Heath, Hollis, Holloway, Hornby, Hurst, Ingram, Jarvis, Keller, Kestrel, Kirby,
Lambert, Larch, Lockwood, Lowell, Marsh, Mason, Meadow, Mercer, Merton, Millbank, Moorland, Morrow, Nettle, Newland,
Norwood, Oakes, Oldfield, Orchard, Osgood, Palmer, Parrish, Pemberton, Pike, Plover, Porter, Quill, Radley, Ramsey,
Redfern, Rivers, Rook, Rowan, Sandford, Sawyer, Selby, Shepherd, Silver, Slater, Sparrow, Stone, Summers, Swift,
Tanner, Thorne, Tilford, Turner, Underhill, Vale, Vickers, Wainwright, Walden, Ware, Weaver, Webb, Westbrook, Wheeler,
Whitlock, Wilder, Winslow, Wood, Wren, Yardley, Yates
""")
TOWNS = _split("""
Alderbury, Amberley Cross, Ashwick, Barrowmouth, Beechham, Birkton, Blackford, Bramley Bay, Brightsea, Brockley,
Burnhaven, Calderwick, Cinderford Mill, Clearwater, Coldbrook, Copperhill, Crowsend, Dunmere, Eastmarsh, Elmford,
Fallowfield, Fernbridge, Foxholm, Glenrook, Goldenmoor, Graywater, Greenport, Harrowgate Hill, Hartsea, Hazelmere,
Heronsford, Highcliff, Hollowbrook, Ivyton, Kelderby, Kingsmoor, Lakenheath Lane, Larkfield, Lindenau, Littlewick,
Longmeadow, Marlow Sands, Merridale, Millhaven, Mosswick, Netherby, Newbridge, Northcove, Oakhampton, Oldcastle,
Otterbourne, Pebbleton, Pinewood, Quarrydale, Ravenshore, Redcliff, Rosemouth, Saltmarsh, Sandhurst Bay, Silverdale,
Southwell, Springvale, Stonebridge, Summerfield, Sunderwick, Thistledown, Thornbury, Tidewell, Underwood, Waterford,
Westhaven, Whitby Sands, Willowdale, Windermoor, Winterbourne, Woodbridge, Yellowtree
""")
JOBS = _split("""
accountant, actor, artist, author, baker, banker, barber, beekeeper, blacksmith, bookseller, builder, bus driver,
butcher, captain, carpenter, cashier, chemist, cleaner, clerk, cook, dancer, designer, editor, electrician, engineer,
farmer, firefighter, fisherman, florist, gardener, glassmaker, guide, hairdresser, hunter, inventor, jeweller, judge,
lawyer, librarian, locksmith, mechanic, merchant, miller, miner, musician, optician, painter, photographer, pianist,
pilot, plumber, poet, police officer, postman, potter, printer, professor, programmer, reporter, roofer, sailor,
scientist, secretary, shepherd, shoemaker, shopkeeper, singer, soldier, student, surveyor, tailor, teacher,
translator, waiter, watchmaker, weaver, welder, writer
""")
RELATIVES = _split("""
aunt, brother, cousin, daughter, father, friend, grandfather, grandmother, mother, neighbour, nephew, niece, partner,
sister, son, uncle, colleague, landlord, old friend, best friend, teacher, younger brother, older sister
""")
ANIMALS = _split("""
ant, badger, bat, bear, beaver, bee, beetle, bird, blackbird, bull, butterfly, calf, camel, cat, chicken, cow, crab,
crow, deer, dog, dolphin, donkey, dove, duck, eagle, eel, elephant, falcon, fish, fly, fox, frog, goat, goose,
hamster, hare, hawk, hedgehog, heron, horse, kitten, lamb, lion, lizard, magpie, mole, monkey, moth, mouse, mule,
otter, owl, ox, parrot, peacock, pig, pigeon, pony, puppy, rabbit, rat, raven, robin, rooster, salmon, seal, shark,
sheep, snail, snake, sparrow, spider, squirrel, stork, swallow, swan, tiger, toad, tortoise, trout, turkey, turtle,
wasp, whale, wolf
""")
PETS = _split("cat, dog, hamster, kitten, parrot, pony, puppy, rabbit, tortoise, goat, old dog, grey cat, guinea pig")
PET_NAMES = _split("""
Acorn, Bandit, Barley, Biscuit, Button, Captain, Cherry, Cinnamon, Cloud, Coco, Cricket, Domino, Ginger, Hazelnut,
Honey, Jelly, Lucky, Marble, Misty, Muffin, Nutmeg, Oreo, Patch, Peanut, Pebble, Pepper, Pickle, Pumpkin, Rusty,
Shadow, Smokey, Snowball, Socks, Spotty, Sunny, Teddy, Tiger, Toffee, Treacle, Whiskers
""")
FOODS = _split("""
apple, apricot, bagel, banana, biscuit, bun, cabbage, cake, carrot, cheese, cherry, chocolate, cookie, cucumber,
dumpling, egg, fig, grape, lemon, lettuce, lime, mango, melon, muffin, mushroom, omelette, onion, orange, pancake,
peach, peanut, pear, pepper, pickle, pie, pizza, plum, potato, pumpkin, radish, raisin, raspberry, salad, sandwich,
sausage, soup, steak, stew, strawberry, tart, tomato, turnip, waffle, walnut
""")
VEGETABLES = _split("""
asparagus, beetroot, broccoli, cabbage, carrots, cauliflower, celery, courgettes, garlic, green beans, kale, leeks,
lentils, mushrooms, onions, parsnips, peas, peppers, potatoes, pumpkin, radishes, red beans, spinach, sweetcorn,
tomatoes, turnips, white beans, chickpeas
""")
MEATS = _split(
    "bacon, beef, chicken, duck, ham, lamb, minced beef, prawns, salmon, sausages, tofu, trout, tuna, turkey"
)
STAPLES = _split("barley, bread, couscous, noodles, oats, pasta, rice, wheat grains, dumplings, flat bread")
SPICES = _split("""
basil, bay leaves, black pepper, chilli, cinnamon, cloves, coriander, cumin, dill, ginger, mint, mustard, nutmeg,
oregano, paprika, parsley, rosemary, saffron, sage, sea salt, sesame seeds, thyme, turmeric, vanilla
""")
BAKING = _split("""
almonds, apples, brown sugar, butter, cherries, chocolate, cocoa, cream, eggs, flour, hazelnuts, honey, lemon peel,
milk, oats, pears, plums, poppy seeds, raisins, sour cream, sugar, walnuts, yeast, yoghurt
""")
DRINKS = _split("""
apple juice, black tea, cocoa, coffee, cold water, fresh milk, ginger tea, green tea, hot chocolate, lemonade, mint
tea, orange juice, sparkling water, tomato juice, warm milk, tea with honey
""")
OBJECTS = _split("""
album, alarm clock, apron, backpack, bag, ball, basket, bell, belt, blanket, book, bottle, bowl, box, bracelet, brick,
broom, brush, bucket, button, calendar, camera, candle, card, carpet, chain, chair, clock, coin, comb, compass, cup,
curtain, cushion, desk, diary, dictionary, dish, doll, drawer, drum, envelope, fan, feather, flag, flute, fork, frame,
glass, glove, guitar, hammer, handbag, hat, helmet, hook, iron, jar, jug, kettle, key, kite, knife, ladder, lamp,
lantern, letter, magazine, magnet, map, mask, match, medal, mirror, mug, nail, napkin, necklace, needle, newspaper,
notebook, oven, package, paintbrush, pan, parcel, pen, pencil, photograph, picture, pillow, pipe, plate, pocket watch,
postcard, pot, present, purse, puzzle, radio, rake, ribbon, ring, rope, ruler, sack, saw, scarf, scissors case, shelf,
shell, shovel, spade, spoon, stamp, stool, suitcase, sword, table, teapot, telescope, tent, ticket, torch, towel, toy,
tray, trumpet, umbrella, vase, violin, wallet, watering can, wheel, whistle, wooden box
""")
CLOTHES = _split("""
apron, blouse, boots, cap, cardigan, cloak, coat, dress, gloves, gown, hat, jacket, jeans, jumper, mittens, pyjamas,
raincoat, robe, sandals, scarf, shirt, shoes, shorts, skirt, slippers, socks, suit, sweater, tie, trousers, uniform,
vest
""")
MACHINES = _split("""
bicycle, boat, boiler, bus, camera, car, clock, computer, dishwasher, engine, fan, fence, gate, heater, kettle, lamp,
lift, lock, motor, motorbike, oven, piano, printer, pump, radio, roof, scooter, sewing machine, stove, telephone,
television, tractor, train, tram, truck, van, washing machine, watermill, window, wheelbarrow
""")
MATERIALS = _split("""
brass, brick, bronze, cardboard, clay, copper, cotton, glass, gold, iron, leather, linen, marble, oak, paper, pine
wood, plastic, rubber, sand, silk, silver, steel, stone, straw, tin, velvet, wax, wool
""")
PLANTS = _split("""
apple tree, ash tree, bamboo, bean, birch, blackberry bush, bluebell, cactus, cherry tree, chestnut tree, clover,
daffodil, daisy, elm, fern, fig tree, fir tree, heather, holly, ivy, lavender, lilac, lily, maple, marigold, nettle,
oak, orchid, palm, pear tree, pine tree, poppy, primrose, rose, sage, sunflower, thistle, tulip, vine, violet, walnut
tree, waterlily, willow
""")
PLACES = _split("""
airport, apartment, attic, bakery, bank, barn, bath, bay, beach, bookshop, bridge, bus stop, cafe, campsite, canal,
castle, cathedral, cave, cellar, church, cinema, classroom, cliff, concert hall, corner shop, cottage, courtyard,
desert, dining room, dock, factory, farm, ferry, field, forest, fountain, garage, garden, greenhouse, gymnasium, hall,
harbour, hill, hotel, island, kitchen, lake, lane, library, lighthouse, market, meadow, mill, mine, monastery,
mountain, museum, night market, office, orchard, palace, park, path, pier, playground, pond, port, post office,
railway station, restaurant, river, roof garden, school, shed, shop, square, stable, stadium, station, stream, studio,
supermarket, swimming pool, tea room, temple, theatre, town hall, tower, train, tunnel, university, valley, village,
vineyard, village green, wall, waterfall, well, windmill, wood, workshop, zoo
""")
ROOMS = _split("""
attic, balcony, bathroom, bedroom, cellar, dining room, garage, hall, kitchen, living room, shed, study
""")
LANDSCAPES = _split("""
a chain of low hills, a deep valley, a dry plain, a forest of pines, a frozen lake, a green meadow, a high mountain, a
lonely beach, a long river, a narrow gorge, a quiet bay, a row of old cottages, a rocky coast, a sandy desert, a wide
marsh, fields of wheat, orchards and vineyards, steep cliffs, the ruins of a tower, a field of wild flowers
""")
VEHICLES = _split("""
bicycle, boat, bus, canoe, car, carriage, ferry, horse, motorbike, sailing boat, night train, slow train, steamer,
taxi, tram, train, truck, van, cable car, coach
""")
COLOURS = _split("""
black, blue, bright red, brown, cream, dark blue, dark green, golden, green, grey, light blue, orange, pale green,
pink, purple, red, silver, turquoise, violet, white, yellow
""")
ADJECTIVES = _split("""
ancient, beautiful, big, blank, bright, broken, cheap, clean, clever, cold, comfortable, common, curious, dark, deep,
delicate, dirty, double, dry, dusty, elegant, empty, enormous, expensive, famous, fancy, fine, flat, foreign, fragile,
fresh, funny, gentle, giant, handsome, hard, heavy, hidden, high, hollow, huge, large, light, little, long, lost,
loud, lovely, low, magic, modern, mysterious, narrow, neat, new, noisy, odd, old, ordinary, painted, plain, pleasant,
polished, pretty, quiet, rare, rough, round, rusty, secret, shallow, sharp, shiny, short, simple, slow, small, smooth,
soft, solid, special, square, steep, strange, strong, sturdy, tall, thick, thin, tidy, tiny, ugly, unusual, useful,
valuable, warm, wet, wide, wild, wooden, wonderful, worn
""")
TRAITS = _split("""
ambitious, brave, calm, careful, careless, charming, cheerful, clever, clumsy, curious, eager, foolish, friendly,
generous, gentle, greedy, grumpy, helpful, honest, humble, impatient, jealous, kind, lazy, lonely, loyal, modest,
nervous, noisy, patient, polite, proud, quiet, restless, rude, selfish, sensible, serious, shy, silly, strict,
stubborn, talkative, thoughtful, timid, tired, wise, witty
""")
FEELINGS = _split("""
afraid, amazed, angry, annoyed, anxious, ashamed, bored, calm, cheerful, cold, confused, content, curious, delighted,
disappointed, excited, frightened, glad, grateful, guilty, happy, homesick, hopeful, hungry, hurt, lonely, lucky,
miserable, nervous, pleased, proud, puzzled, ready, relaxed, relieved, sad, safe, satisfied, shocked, sleepy, sorry,
surprised, thankful, thirsty, tired, uneasy, upset, worried
""")
ADVERBS = _split("""
at last, at once, awkwardly, bravely, brightly, calmly, carefully, carelessly, cheerfully, clearly, cleverly, coldly,
eagerly, easily, firmly, gently, gladly, gracefully, happily, heavily, honestly, hungrily, in silence, kindly, lazily,
loudly, nervously, neatly, noisily, patiently, politely, proudly, quickly, quietly, rapidly, sadly, secretly,
seriously, shyly, silently, slowly, smoothly, softly, steadily, suddenly, tightly, together, warmly, wisely, with a
smile, with a sigh, with great care, without a word
""")
TIMES = _split("""
after breakfast, after dinner, after lunch, after sunset, after the storm, at dawn, at midnight, at noon, at night,
before sunrise, before the holidays, during the night, early in the morning, every evening, in April, in August, in
December, in February, in January, in July, in June, in March, in May, in November, in October, in September, in the
afternoon, in the autumn, in the evening, in the spring, in the summer, in the winter, last month, last night, last
week, last year, late at night, on a cold day, on a rainy day, on a sunny day, on Friday, on Monday, on Saturday, on
Sunday, on Thursday, on Tuesday, on Wednesday, one day, one evening, one morning, one night, that afternoon, that
evening, that morning, that night, the day before, the following week, the next day, the next morning, two days later,
a week later
""")
MONTHS = _split("""
January, February, March, April, May, June, July, August, September, October, November, December
""")
DAYS = _split("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
SKIES = _split("""
clear, cloudy, dull, dry and sunny, foggy, grey, hazy, mostly clear, mostly cloudy, overcast, rainy, showery, snowy,
stormy, sunny, thundery, misty, bright, windy, wet
""")
DIRECTIONS = _split("north, north-east, east, south-east, south, south-west, west, north-west")
HOBBIES = _split("""
baking bread, bird watching, board games, camping, chess, climbing, collecting stamps, cooking, crosswords, cycling,
dancing, drawing, fishing, gardening, hiking, jogging, juggling, knitting, model trains, music, painting, photography,
playing cards, playing the flute, playing the guitar, playing the piano, poetry, pottery, reading, riding, rowing,
running, sailing, sewing, singing, skating, skiing, swimming, tennis, theatre, walking, wood carving, yoga
""")
SPORTS = _split("""
badminton, basketball, cricket, fencing, football, handball, hockey, rowing, rugby, table tennis, tennis, volleyball,
water polo
""")
TEAMS = _split("""
Bears, Comets, Crows, Dragons, Eagles, Falcons, Foxes, Giants, Hawks, Herons, Hornets, Knights, Lions, Owls, Pirates,
Ravens, Rovers, Sharks, Stars, Tigers, Wanderers, Wasps, Wolves
""")
SUBJECTS = _split("""
art, astronomy, biology, chemistry, computing, drama, economics, engineering, English, French, geography, geology,
German, grammar, history, law, literature, mathematics, music, philosophy, physics, poetry, Spanish
""")
ABSTRACTS = _split("""
accident, adventure, advantage, advice, answer, argument, beginning, bill, birthday, chance, change, choice, contract,
courage, culture, danger, debt, decision, dream, duty, education, effort, election, ending, exam, experience, failure,
faith, fear, festival, freedom, friendship, future, game, habit, happiness, health, holiday, honour, hope, idea,
journey, joke, justice, knowledge, law, lesson, luck, marriage, meeting, memory, message, mistake, money, mystery,
news, opinion, order, past, patience, peace, plan, pleasure, poem, problem, project, promise, question, reason,
result, reward, rule, secret, silence, skill, song, speech, story, strength, success, surprise, theory, time, trade,
tradition, trip, trouble, truth, victory, wedding, wisdom, wish, work
""")
BODY = _split("""
ankle, arm, back, chest, ear, elbow, eye, face, finger, foot, forehead, hand, head, heel, hip, jaw, knee, leg, lip,
neck, nose, shoulder, stomach, thumb, throat, toe, tongue, tooth, wrist
""")
AILMENTS = _split("""
a blocked nose, a burn, a cold, a cough, a cut, a fever, a headache, a high temperature, a mild infection, a
nosebleed, a rash, a runny nose, a sore throat, a sprained ankle, a stiff neck, a stomach ache, a sunburn, a swollen
finger, a toothache, a twisted knee, an earache, an insect bite, back pain, dizziness, dry skin, hay fever, high blood
pressure, knee pain, muscle pain, poor sleep, shoulder pain, stiffness, eye strain, weakness, low energy, a bruise,
sickness, swelling, itching, chest pain, short breath
""")
REMEDIES = _split("""
a bandage, a cold compress, a cool bath, a dry room, a few days of rest, a healthy diet, a hot water bottle, a warm
shower, an early night, clean water and soap, cold water, fresh air, gentle exercises, gentle stretching, less coffee,
less salt, light exercise, light meals, plenty of fluids, plenty of rest, sleep, slow breathing, tablets from the
pharmacy, tea with honey, warm clothes, warm soup, a short walk, an ice pack, a soft pillow, good shoes
""")
HEALTHY_HABITS = _split("""
%drink enough water, %eat fresh fruit, %eat more vegetables, %go for a walk, %go to bed early, %keep the back
straight, %lift heavy things with care, %measure the blood pressure, %rest the eyes, %sleep for eight hours, %spend
time outside, %stretch the legs, %stretch the muscles, %take a break, %take deep breaths, %talk with friends, %wash
the hands, %wear warm clothes, %brush the teeth, %do a few exercises, %check the weight, %wear a hat in the sun, %stop
smoking, %use the stairs, %bend the knees, %raise the arms slowly, %balance on one leg, %warm up before sport
""")
CONNECTORS = _split("""
after a while, a moment later, a little later, all at once, before long, by chance, for a long time, from time to
time, in the end, luckily, not far away, now and then, of course, on the way home, once again, soon, strangely, sooner
or later, then, this time, to be honest, unfortunately, without warning, meanwhile
""")
PROVERBS = _split("""
a good plan saves a long walk, a kind word costs nothing, a small leak can sink a big boat, the early bird finds the
seed, every storm comes to an end, good bread needs time, he who asks learns the way, many hands make the load light,
no road is too long with a friend, one step at a time reaches the hill, still water runs deep, the best gift is time,
the one who waits catches the fish, what is shared tastes better, whoever plants a tree plants shade, words are cheap
but work is not
""")

# Whole verb phrases: "%" marks the verb that the grammar inflects; {braces} name other lists.
VERB_PHRASES = _split("""
%carry {a_object} to the {place}, %bring {a_object} to {rel}, %buy {a_object} at the market, %sell the {adj} {object},
%find {a_object} under the {place}, %lose {a_object} near the {place}, %hide {a_object} behind the {object}, %paint
the {object} {colour}, %draw {a_animal} on the {object}, %open the {adj} {object}, %close the {object}, %break the
{object}, %drop {a_object}, %clean the {room}, %sweep the {room}, %paint the {room}, %tidy the {room}, %repair the
{machine}, %start the {machine}, %stop the {machine}, %build {a_machine}, %borrow {a_object} from {rel}, %lend
{a_object} to {rel}, %cook {meal} for {rel}, %bake {a_food}, %eat {a_food}, %cut {a_food} into slices, %taste the
{food}, %share {a_food} with {rel}, %drink {drink}, %pour {drink} into the {object}, %feed the {animal}, %chase the
{animal}, %catch {a_animal}, %watch the {animal}, %follow the {animal} into the {place}, %train the {pet}, %plant
{a_plant} in the garden, %water the {plant}, %cut the {plant}, %grow {pl_plant}, %pick flowers near the {place},
%visit the {place}, %leave the {place}, %walk to the {place}, %run to the {place}, %drive to {town}, %travel to
{town}, %ride to the {place}, %swim across the {place}, %climb the hill behind the {place}, %wait at the {place}, %sit
in the {place}, %stand near the {place}, %sleep in the {place}, %work in the {place}, %live near the {place}, %dance
in the {place}, %sing in the {place}, %meet {rel} at the {place}, %meet {a_job} in {town}, %call {rel}, %write a
letter to {rel}, %send {a_object} to {rel}, %read a book about {pl_animal}, %study {subject}, %teach {subject}, %learn
{subject}, %wear {a_colour} {cloth}, %wash the {cloth}, %sew {a_colour} {cloth}, %fold the {cloth}, %forget the
{abstract}, %remember the {abstract}, %talk about the {abstract}, %explain the {abstract} to {rel}, %think about the
{abstract}, %laugh about the {abstract}, %dream about {a_adj} {place}, %hear a noise in the {place}, %see {a_animal}
near the {place}, %look for the {object}, %throw the {object} into the {place}, %play {sport}, %win a prize for
{hobby}, %enjoy {hobby}, %practise {hobby}, %fall asleep in the {place}, %lock the {place}, %take a photograph of the
{place}, %hold the {object} in one hand, %lift the {adj} {object}, %fill the {object} with water, %count the
{pl_object}, %collect {pl_object}, %pay {n} coins for {a_object}, %choose the {colour} {cloth}, %give {a_object} to
{rel}, %keep the {object} in the {room}, %polish the {object}, %measure the {room}, %turn left at the {place}, %cross
the bridge near {town}, %spend the night in {town}, %arrive in {town}, %join the {hobby} club, %help {rel}, %thank
{rel}, %promise {rel} {a_object}, %show {rel} the {object}, %ask {rel} for help, %listen to the radio, %make {drink},
%light the fire, %hang the {object} on the wall, %pack {a_object} for the journey
""")
