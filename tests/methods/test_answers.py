"""Answers in the forms that language models really give."""

import pytest

from vstar_kernels.methods.answers import parse_stages

A, B, C = "A closed bud in a garden.", "A half-open rose in a garden.", "A full rose in a garden."

ANSWERS = {
    "numbered": f"1. {A}\n2. {B}\n3. {C}",
    "parentheses": f"1) {A}\n2) {B}\n3) {C}\n",
    "brackets": f"[1] {A}\n[2] {B}\n[3] {C}",
    "colons": f"1: {A}\n2: {B}\n3: {C}",
    "dashes": f"1 - {A}\n2 – {B}\n3 — {C}",
    "no space": f"1.{A}\n2.{B}\n3.{C}",
    "blank lines": f"\n\n1. {A}\n\n\n2. {B}\n\n3. {C}\n\n",
    "windows lines": f"1. {A}\r\n2. {B}\r\n3. {C}\r\n",
    "indented": f"  1. {A}\n  2. {B}\n  3. {C}",
    "preamble and remark": f"Sure! Here are 3 stages:\n\n1. {A}\n2. {B}\n3. {C}\n\nLet me know!",
    "remark at once": f"1. {A}\n2. {B}\n3. {C}\nThese stages show a smooth change.",
    "indented remark": f"1. {A}\n2. {B}\n3. {C}\n   Let me know if you want more.",
    "bold": f"**1.** {A}\n**2.** {B}\n**3.** {C}",
    "bold labels": f"**Stage 1:** {A}\n\n**Stage 2:** {B}\n\n**Stage 3:** {C}",
    "bulleted labels": f"* **Stage 1**: {A}\n* **Stage 2**: {B}\n* **Stage 3**: {C}",
    "headings": f"### Stage 1\n{A}\n\n### Stage 2\n{B}\n\n### Stage 3\n\n{C}",
    "named labels": f"Stage 1 (bud): {A}\nStage 2 (half): {B}\nStage 3 (full): {C}",
    "frames": f"Frames 1-5: {A}\nFrames 6–11: {B}\nFrames 12-16: {C}",
    "from zero": f"Scene 0: {A}\nScene 1: {B}\nScene 2: {C}",
    "wrapped": "1. A closed bud\nin a garden.\n2. A half-open\n   rose in a garden.\n"
    "3. A full rose in a\ngarden.\n",
    "sub-bullets": "1. A closed bud\n   - in a garden.\n2. A half-open rose\n   - in a garden.\n"
    "3. A full rose\n   - in a garden.",
    "sub-numbers": "1. A closed bud\n   1. in a garden.\n2. A half-open rose\n   1. in a\n"
    f"   2. garden.\n3. {C}\n",
    "bullets": f"- {A}\n- {B}\n- {C}",
    "round bullets": f"Here is the synopsis:\n• {A}\n• {B}\n• {C}\n\nI hope this helps!",
    "quotes": f'1. "{A}"\n2. “{B}”\n3. «{C}»',
    "italics": f"1. *{A}*\n2. _{B}_\n3. __{C}__",
    "lines": f"{A}\n{B}\n\n{C}",
    "announced lines": f"Here are the stages:\n{A}\n{B}\n{C}\nFeel free to adapt them.",
    "quoted lines": f'"{A}",\n"{B}",\n"{C}"',
    "JSON": f'["{A}", "{B}", "{C}"]',
    "JSON objects": f'[{{"stage": 1, "description": "{A}"}}, {{"stage": 2, "description": "{B}"}},'
    f' {{"stage": 3, "description": "{C}"}}]',
    "JSON titles": f'[{{"title": "x", "description": "{A}"}}, {{"prompt": "x", "text": "{B}"}},'
    f' {{"sight": "{C}"}}]',
    "JSON key": f'{{"prompt": "x", "subprompts": ["{A}", "{B}", "{C}"]}}',
    "JSON numbered": f'{{"stage 1": "{A}", "stage 2": "{B}", "stage 3": "{C}"}}',
    "JSON fence": f'Here:\n\n```json\n{{"stages": ["{A}", "{B}", "{C}"]}}\n```\nEnjoy [it].',
    "JSON in a sentence": f'The stages are ["{A}", "{B}", "{C}"], as asked.',
    "list in a fence": f"```\n1. {A}\n2. {B}\n3. {C}\n```\nThat is all.",
    "reasoning": f"<think>\n1. Bud\n2. Rose\n</think>\n\n1. {A}\n2. {B}\n3. {C}",
    "end of reasoning": f"1. Bud\n2. Rose\n</think>\n\n1. {A}\n2. {B}\n3. {C}",
}


@pytest.mark.parametrize("form", ANSWERS)
def test_forms(form):
    assert parse_stages(ANSWERS[form]) == [A, B, C]


def test_what_only_looks_like_a_number():
    assert parse_stages("1. 3:15 on a clock.\n2. 10.5 metres of snow.") == [
        "3:15 on a clock.",
        "10.5 metres of snow.",
    ]
    assert parse_stages("1. A sign with [5] on it.\n2. A blank sign.") == [
        "A sign with [5] on it.",
        "A blank sign.",
    ]
    assert parse_stages("A town in 1900.\n3:15 on its clock.") == [
        "A town in 1900.",
        "3:15 on its clock.",
    ]
    assert parse_stages('1. Spring: a tree.\n2. Autumn: "a tree".') == [
        "Spring: a tree.",
        'Autumn: "a tree".',
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("<think>1. A bud.</think>", "is empty"),
        ("<think>Let me see. 1. A bud", "cut off"),
        (f'["{A}", "{B}"', "cut off"),
        (f'{{"stages": ["{A}", ', "cut off"),
        ("[]", "no stages"),
        ("{}", "no stages"),
        ('{"mood": "calm", "title": "A rose"}', "no list of stages"),
        ("[1, 2]", "no description: 1"),
        ('[{"a": "x", "b": "y"}]', "no description"),
        (f"1. {A}\n3. {C}", "numbered 1, 3"),
        (f"1. {A}\n2. {C}\n\nShorter:\n\n1. Bud.\n2. Rose.", "numbered 1, 2, 1, 2"),
        ("1.\n2.\n", "stage 1 has no text"),
        (f"1. {A}\n2. …", "stage 2 has no text"),
        ('["", "A bud."]', "stage 1 has no text"),
        ("I'm sorry, but no.\nAsk me for something else.", "refusal"),
        ("| stage | text |\n|---|---|\n| 1 | A bud. |", "table"),
    ],
)
def test_what_cannot_be_read(answer, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(answer)
