"""What the tutorials say in numbers is what their saved outputs show.

A number in the prose must stand in an output, to the digits that are quoted, or in the code. What
is told of trials that the page does not show, or of data, is listed here with its reason. Numbers
in words, "a third of the mistakes", are claims of which each has its own comparison.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from test_site import NBS, Page, prose

TUTORIALS = {path.stem: Page.read(path) for path in sorted((NBS / "tutorials").glob("*.ipynb"))}
NUMBER = re.compile(r"(?<![\w.,@/^-])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(\s?%)?(?!\w|\.\d)")
SMALL = 12 # whole numbers up to here count things in the text more often than results

DATA, TRIAL = "the size of a data set", "a trial that the page tells of and does not show"
ELSEWHERE = {
    "01_first_memory": {"1797": DATA},
    "02_energy_transformer": {"21": "every seventh of 144 patches"},
    "04_discrete_memories": {"0.1382": "from the cited paper"},
    "05_denoising_memory": {"5,000": DATA, "500": DATA, "0.067": "the variance of the images"}
    | dict.fromkeys(("20", "0.039", "23", "128", "240", "0.062", "0.09"), TRIAL)
    | dict.fromkeys(("0.022", "0.024", "0.054"), TRIAL),
    "06_two_directions": {"5,000": DATA, "500": DATA}
    | dict.fromkeys(("150", "95.2 %", "70", "96.3 %", "95.6 %", "77 %", "130"), TRIAL),
    "08_completing_digits": {"5,000": DATA},
    "09_memories_for_tables": {"569": DATA, "797": DATA},
    "12_sampling_and_training": {"1,797": DATA, "18.9": TRIAL},
}


def numbers(text: str) -> list[tuple[str, float, int]]:
    "(as written, value, decimals of the value) of the numbers in a text"
    found = []
    for whole, part, percent in NUMBER.findall(text):
        value, decimals = float(whole.replace(",", "") + part), max(len(part) - 1, 0)
        if percent: value, decimals = value / 100, decimals + 2
        found.append((whole + part + percent, value, decimals))
    return found


def outputs(page: Page) -> str:
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in page.code
        for output in cell.outputs
    ]
    return "\n".join(texts)


def unfounded(page: Page) -> list[str]:
    "Numbers of the prose that neither an output nor the code has"
    shown = [value for _, value, _ in numbers(outputs(page))]
    chosen = {value for _, value, _ in numbers("\n".join(c.source for c in page.code))}
    missing = []
    for written, value, decimals in numbers(prose(page.markdown)):
        if decimals == 0 and value <= SMALL or value in chosen: continue
        step = 10.0**-decimals
        if not any(abs(v - value) <= step / 2 * (1 + 1e-9) for v in shown): missing.append(written)
    return list(dict.fromkeys(missing))


@pytest.mark.parametrize("name", TUTORIALS)
def test_numbers_of_the_prose_stand_in_the_outputs(name):
    assert unfounded(TUTORIALS[name]) == list(ELSEWHERE.get(name, {}))


def test_a_number_that_the_output_does_not_show_is_found():
    output = new_output("stream", text="residual 3.768, 41.6% right, 1234 steps")
    page = lambda text: Page(
        "x.ipynb", [new_markdown_cell(text), new_code_cell("n = 77", outputs=[output])]
    )
    assert not unfounded(page("A residual of 3.77, 42 % right, in 1,234 steps, with 77 of 9."))
    assert unfounded(page("The residual is 18.35, or 3.8, or 3.78; 43 %; 96 steps, 1235.")) == [
        "18.35",
        "3.78",
        "43 %",
        "96",
        "1235",
    ]
    assert not unfounded(page("What `n = 99` and $99$ say is code and mathematics."))


@dataclass
class Claim:
    page: str
    words: str
    output: str # a pattern whose groups are the numbers that decide
    holds: Callable[..., bool]


CLAIMS = [
    Claim(
        "01_first_memory",
        "one of them was wrong in almost a fifth of the cases",
        r"(\d+) wrong answers",
        lambda wrong: 15 < wrong < 20,
    ),
    Claim(
        "02_energy_transformer",
        "what is not there is a *larger* share for the own kind",
        r"goes to the own kind:\s+([\d.]+) before, ([\d.]+) after",
        lambda before, after: abs(after - before) < 0.02,
    ),
    Claim(
        "03_three_bodies",
        "key and picture, and picture and cipher, agree in about half of the pixels",
        r"a and b agree in (\d+)% of the pixels\na and c agree in (\d+)%",
        lambda key, cipher: 40 < key < 60 and 40 < cipher < 60,
    ),
    Claim(
        "04_discrete_memories",
        "the small networks keep about two patterns\nof five and the large ones one of twenty",
        r"N = 1000  load 0.20 .*kept\s+(\d+)%[\s\S]*N =  250  load 0.20 .*kept\s+(\d+)%",
        lambda large, small: 35 < small < 45 and 4 < large < 6,
    ),
    Claim(
        "05_denoising_memory",
        "leaves the best linear method of its size behind by more than a quarter",
        r"ours .* ([\d.]+) × linear",
        lambda ratio: ratio < 0.75,
    ),
    Claim(
        "05_denoising_memory",
        "several dozen of them together",
        r"memories, (\d+) speak",
        lambda active: 30 < active < 100,
    ),
    Claim(
        "06_two_directions",
        "on those it was trained with it makes a third of the mistakes",
        r"(\d+) of 1000 wrong; on training images ([\d.]+)% right",
        lambda wrong, right: 0.28 < (100 - right) * 10 / wrong < 0.39,
    ),
    Claim(
        "06_two_directions",
        "Of thirty starts three fell into the wide valley of the 0",
        r"by itself (\d+)%",
        lambda right: round(30 * (1 - right / 100)) == 3,
    ),
    Claim(
        "07_three_gradients",
        "The gradients of one batch agree to a few parts in ten thousand",
        r"unrolled .* length ([\d.]+)\nequilibrium .* length ([\d.]+)",
        lambda unrolled, nudged: max(abs(1 - unrolled), abs(1 - nudged)) < 1e-3,
    ),
    Claim(
        "07_three_gradients",
        "takes four times the memory of the implicit method and three times its time",
        r"implicit\s.*%\s+(\d+)\s+([\d.]+)\nunrolled\s.*%\s+(\d+)\s+([\d.]+)\n",
        lambda t, memory, unrolled_t, unrolled: (
            3.4 < unrolled / memory < 4.6 and 2.5 < unrolled_t / t < 3.6
        ),
    ),
    Claim(
        "07_three_gradients",
        "It recalls three times in all, yet takes less than unrolling",
        r"unrolled\s.*%\s+(\d+)\s+[\d.]+\nequilibrium\s.*%\s+(\d+)\s+[\d.]+\n",
        lambda unrolled, nudged: nudged < 0.9 * unrolled,
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.page}: {c.words[:40]}")
def test_claims_in_words_hold_in_the_outputs(claim):
    page = TUTORIALS[claim.page]
    assert claim.words in page.markdown, "the tutorial no longer says so: change the claim"
    found = re.findall(claim.output, outputs(page))
    assert found, "no output matches"
    last = found[-1] if isinstance(found[-1], tuple) else found[-1:]
    assert claim.holds(*map(float, last))
