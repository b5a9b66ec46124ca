"""Plans videos in two stages (StarVid): what a language model is told, and what becomes of it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.methods.arguments import check_integer, check_text
from vstar_kernels.methods.llm.ask import AnswerError, Messages
from vstar_kernels.methods.starvid.trajectory import Subject, Trajectory, trajectories_of
from vstar_kernels.methods.writers import Writer
from vstar_kernels.reading import clean, decode, read_text, require_pydantic, shorten

if TYPE_CHECKING:
    from pydantic import BaseModel

KEY_FRAMES = 6  # as LLM-grounded Video Diffusion (arXiv 2309.17444) plans
MOST_KEY_FRAMES = 64
MOST_SUBJECTS = 12
LARGEST_OUTSIDE = 0.02  # of the picture's side; a box that leaves it by no more is cut off
SMALLEST_AREA = 1 / 256  # of the picture: one cell of a map of 16 × 16
LARGEST_OVERLAP = 0.5  # intersection over union of two boxes in one frame

SUBJECT_RULES = """\
You plan short videos. You get the sentence that a video is made of. List the subjects whose \
places and movements are to be planned: people, animals and things that the sentence names.

- "noun": the one word for the subject, copied letter by letter from the sentence.
- "count": how many of them are seen.
- "verb": the one word for what the subject does, copied letter by letter from the sentence, and \
not the noun; null if the sentence gives it no verb.
- "phrase": its movement in a few words.
- "motion": where it is at the beginning and at the end, how large it is, how fast it moves, and \
what physics says of it: what falls gets faster, what rolls gets slower, what comes nearer gets \
larger.
- "background": what is behind the subjects, in a few words; none of the subjects is in it."""

BOX_RULES = """\
You plan short videos. You get the sentence that a video is made of, a table of its subjects, and \
a number of key frames that lie evenly from the first frame to the last. Give each subject a box \
for each key frame.

- A box is [x0, y0, x1, y1], shares of the picture's width and height from 0 to 1. (0, 0) is the \
upper left corner; x0 < x1 and y0 < y1.
- null in the place of a box: the subject is not in the picture in that key frame.
- Boxes follow the movement that the table describes, with its physics, and keep a size that fits.
- Two boxes of one key frame overlap by less than half of what they cover together.
- Every id of the table is there once, with as many boxes as there are key frames."""

EXAMPLE_PROMPT = "A ball falls beside two sleeping dogs on a lawn."
EXAMPLE_SUBJECTS: dict[str, Any] = {
    "subjects": [
        {
            "noun": "ball",
            "count": 1,
            "verb": "falls",
            "phrase": "falls from above onto the lawn",
            "motion": "Small. Begins at the upper left and falls straight down, faster and faster, "
            "until it lies on the lawn.",
        },
        {
            "noun": "dogs",
            "count": 2,
            "verb": "sleeping",
            "phrase": "lie asleep",
            "motion": "Middle-sized. Lie side by side in the lower right and do not move.",
        },
    ],
    "background": "a lawn in the sun",
}
EXAMPLE_BOXES: dict[str, Any] = {
    "subjects": [
        {
            "id": 1,
            "boxes": [
                [0.1, 0.0, 0.22, 0.2],
                [0.1, 0.03, 0.22, 0.23],
                [0.1, 0.11, 0.22, 0.31],
                [0.1, 0.25, 0.22, 0.45],
                [0.1, 0.45, 0.22, 0.65],
                [0.1, 0.7, 0.22, 0.9],
            ],
        },
        {"id": 2, "boxes": [[0.36, 0.6, 0.64, 0.95]] * 6},
        {"id": 3, "boxes": [[0.68, 0.58, 0.97, 0.94]] * 6},
    ]
}


class PlanError(RuntimeError):
    """There is no plan; the message says why."""


class TrajectoryFile:
    """A file with a :class:`Trajectory`, or with a list of them, of which the prompt chooses one.

    Raises:
        ImportError: ``pydantic`` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        require_pydantic()
        self._path = Path(path)
        self.name = f"the file {self._path}"

    def find(self, prompt: str, key_frames: int | None) -> Trajectory:
        """Returns the file's plan of a prompt.

        Raises:
            ValueError, OSError: The file cannot be read, or has no such plan of this prompt.
        """
        try:
            plans = trajectories_of(decode(read_text(self._path)))
        except OSError as error:
            raise OSError(f"it cannot be read: {error}") from None
        for plan in plans:
            if plan.prompt != clean(prompt):
                continue
            if key_frames not in (None, plan.key_frames):
                raise ValueError(f"expected {key_frames} key frames, found {plan.key_frames}")
            return plan
        there = ", ".join(repr(plan.prompt) for plan in plans)
        raise ValueError(f"it has none, but plans of {shorten(there)}")


class TrajectoryWriter(Writer):
    """Plans where the subjects of a video are, in two questions (StarVid, arXiv 2409.15259).

    >>> writer = vk.TrajectoryWriter.from_endpoint("llama3", base_url="http://localhost:11434/v1")
    >>> writer.write("A cat chases a mouse through the snow.").save("plan.json")

    A language model is asked which subjects there are and how they move, by the rules of physics
    too; and, given that table, for their boxes in each key frame. That there are two questions is
    the paper's; their words are this library's, as the paper's are not public. An answer that
    cannot be used (see :func:`subjects_form`, :func:`boxes_form`) is sent back with what is wrong.

    Args:
        source: What answers; see :meth:`from_endpoint`, :meth:`from_transformers` and
            :meth:`from_file`.
        **settings: ``attempts`` and ``cache``, see :class:`vstar_kernels.methods.writers.Writer`.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or out of its range.
    """

    file_type = TrajectoryFile

    def write(
        self, prompt: str, *, key_frames: int | None = None, refresh: bool = False
    ) -> Trajectory:
        """Returns the plan of a prompt.

        Args:
            prompt: The video as a whole, in a sentence.
            key_frames: For how many frames there are to be boxes; None is 6, or however many a
                file has.
            refresh: Ask even if there are answers in the cache, and replace those.

        Raises:
            PlanError: The source has none after all attempts; the message says what came.
            TypeError, ValueError: The prompt is no text or empty, or key_frames is no integer or
                out of its range.
        """
        check_text("prompt", prompt)
        check_flag(refresh, "refresh")
        if key_frames is not None:
            check_integer("key_frames", key_frames, 1, MOST_KEY_FRAMES)
        try:
            if isinstance(self._source, TrajectoryFile):
                return self._source.find(prompt, key_frames)
            return self._plan(clean(prompt), key_frames or KEY_FRAMES, refresh)
        except (AnswerError, ValueError, OSError) as error:
            problem = f"no plan of {prompt!r} from {self._source.name}: {error}"
        raise PlanError(problem)

    def _plan(self, prompt: str, key_frames: int, refresh: bool) -> Trajectory:
        table: Any = self._ask(about_subjects(prompt), subjects_form(prompt), refresh=refresh)
        subjects = [subject for subject in table.subjects for _ in range(subject.count)]
        answer: Any = self._ask(
            about_boxes(prompt, table.model_dump(), key_frames),
            boxes_form(len(subjects), key_frames),
            refresh=refresh,
        )
        boxes = {entry.id: entry.boxes for entry in answer.subjects}
        planned = [
            Subject(subject.noun, subject.verb, subject.phrase, boxes=boxes[number])
            for number, subject in enumerate(subjects, start=1)
        ]
        return Trajectory(prompt, planned, table.background)


def about_subjects(prompt: str) -> Messages:
    """Returns the first question: the rules, one example, and the prompt."""
    return [
        {"role": "system", "content": SUBJECT_RULES},
        {"role": "user", "content": f"Sentence: {EXAMPLE_PROMPT}"},
        {"role": "assistant", "content": json.dumps(EXAMPLE_SUBJECTS, ensure_ascii=False)},
        {"role": "user", "content": f"Sentence: {prompt}"},
    ]


def about_boxes(prompt: str, table: dict[str, Any], key_frames: int) -> Messages:
    """Returns the second question: the rules, one example, the prompt and its subjects."""
    return [
        {"role": "system", "content": BOX_RULES},
        {"role": "user", "content": _box_question(EXAMPLE_PROMPT, EXAMPLE_SUBJECTS, KEY_FRAMES)},
        {"role": "assistant", "content": json.dumps(EXAMPLE_BOXES)},
        {"role": "user", "content": _box_question(prompt, table, key_frames)},
    ]


def _box_question(prompt: str, table: dict[str, Any], key_frames: int) -> str:
    rows = [
        {"id": 0, "noun": x["noun"], "phrase": x["phrase"], "motion": x["motion"]}
        for x in table["subjects"]
        for _ in range(x["count"])
    ]
    for number, row in enumerate(rows, start=1):
        row["id"] = number
    listed = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return (
        f"Sentence: {prompt}\nBackground: {table['background']}\nSubjects:\n{listed}\n"
        f"Number of key frames: {key_frames}"
    )


def subjects_form(prompt: str) -> type[BaseModel]:
    """Returns the form of the first answer, a pydantic model.

    Its nouns and verbs are words of the prompt, no subject's verb is its noun, and there are at
    most 12 subjects.
    """
    from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

    def check_word(word: str) -> str:
        word = " ".join(word.split())
        if not word or not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE):
            raise ValueError(f"{shorten(word)!r} is not a word of the sentence")
        return word

    class SubjectRow(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        noun: str
        count: int = Field(ge=1, le=MOST_SUBJECTS)
        verb: str | None
        phrase: str
        motion: str

        @field_validator("noun")
        @classmethod
        def name(cls, noun: str) -> str:
            return check_word(noun)

        @field_validator("verb")
        @classmethod
        def act(cls, verb: str | None, row: ValidationInfo) -> str | None:
            verb = check_word(verb) if verb else None
            if verb and verb.lower() == str(row.data.get("noun", "")).lower():
                raise ValueError(f"{shorten(verb)!r} is the noun already")
            return verb

        @field_validator("phrase", "motion")
        @classmethod
        def tidy(cls, text: str) -> str:
            return _tidied(text)

    class Subjects(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        subjects: list[SubjectRow] = Field(fail_fast=True)
        background: str

        @field_validator("subjects")
        @classmethod
        def count(cls, subjects: list[SubjectRow]) -> list[SubjectRow]:
            number = sum(subject.count for subject in subjects)
            if not 1 <= number <= MOST_SUBJECTS:
                raise ValueError(f"expected 1 to {MOST_SUBJECTS} subjects in all, found {number}")
            return subjects

        @field_validator("background")
        @classmethod
        def tidy(cls, text: str) -> str:
            return _tidied(text)

    return Subjects


def boxes_form(num_subjects: int, key_frames: int) -> type[BaseModel]:
    """Returns the form of the second answer, a pydantic model.

    Every subject is there once, with a box or null for each key frame. A box that leaves the
    picture by at most 2 % is cut off at its edge; one that leaves it further, is empty, or covers
    less than 1/256 of it is refused, and so are two of one key frame whose intersection is more
    than half of their union.
    """
    from pydantic import BaseModel, ConfigDict, Field, field_validator

    class SubjectBoxes(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        id: int
        boxes: list[list[float] | None] = Field(
            fail_fast=True, json_schema_extra={"minItems": key_frames, "maxItems": key_frames}
        )

        @field_validator("boxes")
        @classmethod
        def fit(cls, boxes: list[list[float] | None]) -> list[list[float] | None]:
            if len(boxes) != key_frames:
                raise ValueError(f"expected {key_frames} boxes, found {len(boxes)}")
            if all(box is None for box in boxes):
                raise ValueError("the subject is in no key frame")
            return [_fitted(box, number) for number, box in enumerate(boxes, start=1)]

    class Boxes(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        subjects: list[SubjectBoxes] = Field(fail_fast=True)

        @field_validator("subjects")
        @classmethod
        def complete(cls, subjects: list[SubjectBoxes]) -> list[SubjectBoxes]:
            found = sorted(subject.id for subject in subjects)
            if found != [*range(1, num_subjects + 1)]:
                ids = shorten(", ".join(map(str, found)), 60)
                raise ValueError(f"expected the ids 1 to {num_subjects}, each once, found {ids}")
            _check_overlaps({subject.id: subject.boxes for subject in subjects})
            return subjects

    return Boxes


def _tidied(text: str) -> str:
    text = " ".join(text.split())
    if not any(map(str.isalpha, text)):
        raise ValueError("it has no text")
    return text


def _fitted(box: list[float] | None, key_frame: int) -> list[float] | None:
    """Returns a box, cut off at the picture's edges."""
    if box is None:
        return None
    name = f"the box of key frame {key_frame}"
    if len(box) != 4:
        raise ValueError(f"{name} must have 4 numbers, found {len(box)}")
    shown = [float(f"{x:.4g}") for x in box]
    if not all(-LARGEST_OUTSIDE <= x <= 1 + LARGEST_OUTSIDE for x in box):
        raise ValueError(f"{name} leaves the picture, {shown}")
    x0, y0, x1, y1 = (min(max(float(x), 0.0), 1.0) for x in box)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{name} is empty, {shown}: it must have x0 < x1 and y0 < y1")
    fitted = [x0, y0, x1, y1]
    if _area(fitted) < SMALLEST_AREA:
        raise ValueError(f"{name} is too small, {shown}: it must cover 1/256 of the picture")
    return fitted


def _check_overlaps(boxes: dict[int, list[list[float] | None]]) -> None:
    """Raises ValueError where two boxes of a key frame are nearly one."""
    for (one, some), (other, others) in combinations(sorted(boxes.items()), 2):
        for key_frame, (a, b) in enumerate(zip(some, others, strict=True), start=1):
            if a is not None and b is not None and _overlap(a, b) > LARGEST_OVERLAP:
                raise ValueError(
                    f"in key frame {key_frame} the boxes of the ids {one} and {other} overlap by "
                    f"{_overlap(a, b):.0%} of what they cover together; "
                    f"{LARGEST_OVERLAP:.0%} is the most"
                )


def _overlap(a: list[float], b: list[float]) -> float:
    """Returns the intersection over the union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (_area(a) + _area(b) - both)


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
