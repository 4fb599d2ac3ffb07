"""Private-looking data: visit notes of three invented clinics, each with its own habits.

A row is a prompt (the short facts of a visit) and a completion (the note in the style of that clinic). Each note
follows from the facts of its prompt, by fixed rules for findings, assessment and plan, so a fine-tuned model can be
seen to have learnt something: it repeats the facts in the right style. All persons are invented.

* clinic-a, a family practice, writes full notes: subjective, objective, assessment, plan.
* clinic-b, an emergency room, writes terse abbreviations.
* clinic-c, a physiotherapy practice, writes a short narrative.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import words
from grammar import finish

CLINICS = ("clinic-a", "clinic-b", "clinic-c")


@dataclass(frozen=True)
class Row:
    """One visit: what goes in, and the note that should come out."""

    clinic: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class FamilyCase:
    """What the family practice finds and does for one complaint."""

    complaint: str
    findings: tuple[str, ...]
    assessment: str
    plan: str
    back_in: int


@dataclass(frozen=True)
class EmergencyCase:
    """What the emergency room writes for one complaint."""

    complaint: str
    short: str
    suspect: str
    plan: str
    triage: tuple[int, ...]


FAMILY_CASES = (
    FamilyCase(
        "sore throat", ("red throat", "swollen glands"), "acute pharyngitis", "rest, warm tea and paracetamol", 5
    ),
    FamilyCase("dry cough", ("clear lungs", "red throat"), "viral bronchitis", "fluids, rest and cough syrup", 7),
    FamilyCase(
        "earache", ("red ear drum", "fluid behind the ear drum"), "middle ear infection", "ear drops and ibuprofen", 3
    ),
    FamilyCase(
        "headache", ("tense neck muscles", "normal eyes"), "tension headache", "ibuprofen, breaks and more sleep", 14
    ),
    FamilyCase(
        "back pain", ("tense back muscles", "free leg raise"), "low back strain", "warmth, ibuprofen and walking", 10
    ),
    FamilyCase("itchy rash", ("dry red patches", "small blisters"), "contact eczema", "steroid cream twice a day", 14),
    FamilyCase("runny nose", ("pale nasal lining", "watery eyes"), "hay fever", "cetirizine in the evening", 21),
    FamilyCase("stomach ache", ("soft belly", "tender upper belly"), "gastritis", "light meals and omeprazole", 7),
    FamilyCase("poor sleep", ("normal heart sounds", "calm mood"), "insomnia", "less coffee and fixed bed times", 28),
    FamilyCase("burning eyes", ("red eyelids", "clear cornea"), "conjunctivitis", "eye drops four times a day", 4),
)
EMERGENCY_CASES = (
    EmergencyCase("chest pain", "CP", "ACS", "ECG, trops, ASA 300, monitor", (1, 2)),
    EmergencyCase("short of breath", "SOB", "pneumonia", "O2, CXR, bloods, IV abx", (2, 3)),
    EmergencyCase("belly pain", "abdo pain", "appendicitis", "NBM, IV fluids, US abdo, surg r/v", (2, 3)),
    EmergencyCase("head injury", "HI", "concussion", "neuro obs, CT head", (2, 3)),
    EmergencyCase("ankle injury", "ankle inj", "fracture", "XR ankle, ice, splint", (4, 5)),
    EmergencyCase("wrist injury", "wrist inj", "distal radius #", "XR wrist, backslab, analgesia", (3, 4)),
    EmergencyCase("flank pain", "flank pain", "renal colic", "urine dip, CT KUB, diclofenac", (3, 4)),
    EmergencyCase("collapse", "syncope", "arrhythmia", "ECG, BM, monitor, bloods", (1, 2)),
    EmergencyCase("deep cut", "lac", "tendon injury", "washout, sutures, tetanus", (3, 4)),
    EmergencyCase("allergic reaction", "allergic rxn", "anaphylaxis", "IM adrenaline, IV fluids, obs 6h", (1, 2)),
)
PHYSIO_PROBLEMS = (
    "a stiff right knee", "a stiff left knee", "a painful right shoulder", "a painful left shoulder", "low back pain",
    "a stiff neck", "a weak right ankle", "a weak left ankle", "a sore left hip", "a sore right hip", "a tennis elbow",
    "a stiff left wrist",
)  # fmt: skip
PHYSIO_CAUSES = (
    "after a fall", "after an operation", "after a long run", "after gardening", "after a bicycle accident",
    "from office work", "from heavy lifting", "after a football game",
)  # fmt: skip
PHYSIO_EXERCISES = (
    "straight leg raises", "wall slides", "cycling", "balance on one leg", "hip bridges", "calf raises",
    "shoulder circles", "rowing with a band", "neck turns", "squats", "step ups", "stretching", "wrist curls", "planks",
)  # fmt: skip


class Reception:
    """Draws the facts of visits from one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def patient(self) -> tuple[str, str, bool]:
        """First name, surname and whether the patient is a woman."""
        female = self.rng.random() < 0.5
        return self.rng.choice(words.WOMEN if female else words.MEN), self.rng.choice(words.SURNAMES), female

    def tenths(self, low: int, high: int) -> tuple[str, float]:
        """A number with one decimal, as written and as a value."""
        tenths = self.rng.randint(low, high)
        return f"{tenths // 10}.{tenths % 10}", tenths / 10


def family_note(desk: Reception) -> tuple[str, str]:
    """clinic-a: full sentences under four headings."""
    rng = desk.rng
    first, last, female = desk.patient()
    case = rng.choice(FAMILY_CASES)
    age, days, pulse = rng.randint(18, 89), rng.randint(2, 20), rng.randint(56, 104)
    temperature, degrees = desk.tenths(361, 393)
    systolic, diastolic = rng.randint(104, 168), rng.randint(62, 98)
    finding = rng.choice(case.findings)
    sex = "woman" if female else "man"
    prompt = (
        f"Family practice visit\nPatient: {first} {last}, {age}, {sex}\nComplaint: {case.complaint} for {days} days\n"
        f"Temperature: {temperature}\nPulse: {pulse}\nPressure: {systolic}/{diastolic}\nFound: {finding}\nNote:"
    )
    assessment = case.assessment + (" with fever" if degrees >= 38 else "")
    assessment += ", raised blood pressure" if systolic >= 140 else ""
    measure = " Measure the blood pressure again." if systolic >= 140 else ""
    completion = finish(
        f"\nSubjective: {first} {last} is a@ {age}-year-old {sex} with {case.complaint} for {days} days.\n"
        f"Objective: Temperature {temperature}, pulse {pulse}, blood pressure {systolic}/{diastolic}. "
        f"The examination shows {finding}.\nAssessment: {assessment.capitalize()}.\n"
        f"Plan: {case.plan.capitalize()}.{measure} "
        f"Back in {case.back_in} days."
    )
    return prompt, completion


def emergency_note(desk: Reception) -> tuple[str, str]:
    """clinic-b: one line of abbreviations."""
    rng = desk.rng
    female = rng.random() < 0.5
    case = rng.choice(EMERGENCY_CASES)
    arrival, code = rng.choice([("by ambulance", "BIBA"), ("on foot", "walk-in"), ("sent by a doctor", "GP ref")])
    age, hours, triage = rng.randint(16, 93), rng.randint(1, 12), rng.choice(case.triage)
    temperature, degrees = desk.tenths(358, 395)
    heart, systolic, diastolic, oxygen = (
        rng.randint(52, 134),
        rng.randint(84, 182),
        rng.randint(50, 99),
        rng.randint(86, 99),
    )
    prompt = (
        f"Emergency room arrival {arrival}\nPatient: {age}, {'woman' if female else 'man'}\n"
        f"Complaint: {case.complaint} for {hours} hours\nT {temperature}, HR {heart}, BP {systolic}/{diastolic}, "
        f"SpO2 {oxygen}\nTriage: {triage}\nNote:"
    )
    signs = [
        ("febrile", degrees >= 38),
        ("tachy", heart > 100),
        ("hypotensive", systolic < 100),
        ("hypoxic", oxygen < 94),
    ]
    found = ", ".join(name for name, present in signs if present) or "stable"
    completion = (
        f" {age}{'F' if female else 'M'} {code}, c/o {case.short} x{hours}h. T {temperature} HR {heart} "
        f"BP {systolic}/{diastolic} SpO2 {oxygen}. O/E {found}. Imp ?{case.suspect}. P/ {case.plan}. Triage {triage}."
    )
    return prompt, completion


def physio_note(desk: Reception) -> tuple[str, str]:
    """clinic-c: a short narrative."""
    rng = desk.rng
    first, last, female = desk.patient()
    title = "Mrs" if female else "Mr"
    problem = f"{rng.choice(PHYSIO_PROBLEMS)} {rng.choice(PHYSIO_CAUSES)}"
    age, all_ = rng.randint(18, 85), rng.randint(4, 10)
    session = rng.randint(1, all_)
    before = rng.randint(3, 9)
    after = rng.randint(max(1, before - 3), min(9, before + 1))
    one, two = rng.sample(PHYSIO_EXERCISES, 2)
    prompt = (
        f"Physiotherapy session {session} of {all_}\nPatient: {title} {first} {last}, {age}\nProblem: {problem}\n"
        f"Pain: {before} before, {after} after\nExercises: {one}, {two}\nNote:"
    )
    change = "is better" if after < before else "is worse" if after > before else "has not changed"
    ending = f"We meet again next week for session {session + 1}." if session < all_ else "This was the last session."
    completion = (
        f" {title} {last} came to us with {problem}. This was session {session} of {all_}. "
        f"Before we began, the pain was {before} out of 10, and afterwards it was {after}, so it {change}. "
        f"Today we worked on {one} and {two}. {'She' if female else 'He'} will go on with {one} at home. {ending}"
    )
    return prompt, completion


WRITERS: dict[str, Callable[[Reception], tuple[str, str]]] = {
    "clinic-a": family_note,
    "clinic-b": emergency_note,
    "clinic-c": physio_note,
}


def clinic_rows(clinic: str, seed: int) -> Iterator[Row]:
    """An endless stream of one clinic's visits; the same seed gives the same visits."""
    desk = Reception(random.Random(f"{seed}/{clinic}"))
    while True:
        prompt, completion = WRITERS[clinic](desk)
        yield Row(clinic, prompt, completion)
