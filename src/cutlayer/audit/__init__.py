"""What an adversary can read of a run, measured: ``cutlayer audit``.

``recording`` makes (or finds) the frames of a run, ``view`` gives an attack what its adversary has of them and nothing
else, the attacks are the family ``attack``, ``scores`` compares guesses with the truth, which no attack sees, and
``auditing`` puts it together.
"""
