"""Wordings of a relation as cloze templates: mined from sentences that hold its pairs, or paraphrased.

Source: Jiang et al., 2020 (LPAQA), section 3: middle-word mining (distant supervision), paraphrases.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from luthier.errors import MethodError

LONGEST = 10  # words of a template
# Words that say nothing of a relation.
EMPTY = re.compile("a|an|the|of|in|on|at|by|to|for|from|with|and|or|as|is|are|was|were|be|it|its|that|this")


def mine(sentences: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Words between subject and object in sentences that hold both, as templates, the most frequent first."""
    by_subject: dict[str, set[str]] = {}
    for x, y in pairs:
        by_subject.setdefault(x, set()).add(y)
    counts: Counter[str] = Counter()
    for sentence in sentences:
        for x in [x for x in by_subject if x in sentence]:
            for y in [y for y in by_subject[x] if y in sentence]:
                for first, second, text in ((x, y, "{{text}}{}{{mask}}"), (y, x, "{{mask}}{}{{text}}")):
                    between = rf"\b{re.escape(first)}\b(\W(?:.*?\W)?)\b{re.escape(second)}\b"
                    counts.update(text.format(_plain(middle)) for middle in re.findall(between, sentence))
    return [text for text, _ in counts.most_common() if well_formed(text)]


def well_formed(text: str) -> bool:
    """One subject and one gap, at most ten words, and words between them that say something."""
    if text.count("{text}") != 1 or text.count("{mask}") != 1:
        return False
    words = re.findall(r"\w+", re.sub(r"{text}|{mask}", " ", text).lower())
    return len(words) <= LONGEST and not all(EMPTY.fullmatch(word) for word in words)


def distinct(texts: Iterable[str]) -> list[str]:
    """The first of each wording, whatever its case, white space and full stop."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(re.sub(r"\W*$", "", " ".join(text.lower().split())), text)
    return list(found.values())


def paraphrase(templates: Iterable[str], write: Callable[[str], Iterable[str]]) -> list[str]:
    """What `write` makes of each template, subject and gap written [X] and [Y], where it keeps them once."""
    found = []
    for template in templates:
        for text in write(template.replace("{text}", "[X]").replace("{mask}", "[Y]")):
            lines = _plain(text).strip().splitlines()
            line = lines[0].strip() if lines else ""
            found.append(line.replace("[X]", "{text}").replace("[Y]", "{mask}"))
    return [text for text in distinct(found) if well_formed(text)]


def _plain(text: str) -> str:
    """A wording without braces, which would be read as places."""
    return text.replace("{", "(").replace("}", ")")


def sentences(path: str) -> list[str]:
    """Of a text file, one a line at least.

    Raises:
        MethodError: it cannot be read.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MethodError(f"corpus {path} cannot be read: {error}.", fix="Name a text file.") from error
    return re.split(r"(?<=[.!?])\s+|\n+", text)
