"""The places of the first and the second ladder, by the words of their columns in the tables."""

from __future__ import annotations

from past_the_teacher_arms import FEW, MAIN, MANY

FIRST, AXES = "past_the_teacher", "past_the_teacher_axes"
"""The files of both ladders."""
PLACES = {
    "41 tokens": MAIN,
    "start .45": MAIN._replace(student="student-40"),
    "noisy": MAIN._replace(verifier="noisy"),
    "noisy, start .0008": MAIN._replace(verifier="noisy", student="student-0"),
    "graded": MAIN._replace(verifier="graded"),
    "21 tokens": MAIN._replace(task="sums-20"),
    "81 tokens": MAIN._replace(task="sums-80"),
    f"{FEW} prompts": MAIN._replace(prompts=FEW),
    "many right": MANY,
}
"""The columns of the second ladder: the main place, and one thing changed in each of the others."""
STARTS = {"start .058": MAIN, "start .0007": MAIN._replace(student="student-0")}
QUALITY = {
    "teacher right .21": "teacher-20", "teacher right .60": "teacher-50", "teacher right .83": "teacher-80",
    "teacher right .997": "teacher",
}  # fmt: skip
OF_MANY = {"teacher right .54": MANY, "teacher right .82": MANY._replace(teacher="teacher-80")}
