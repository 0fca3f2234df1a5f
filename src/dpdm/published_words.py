"""Words that are to be published: do they name a path of a machine, or hold a key?"""

import re

from dpdm.untrusted import clean

PATH = re.compile(r"""(?:^|[\s"'`(=:,])((?:/|~/|file://|[A-Za-z]:\\|\\\\)[^\s"'`/\\]+[/\\][^\s"'`)]*)""")
LONGEST_NAME = 200  # of a data set
HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{32,}(?![0-9A-Za-z])")


def check_words(name: str, text: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    """Returns a line for each kind of secret that words seem to hold: a path of a machine; a key, hash or fingerprint.

    Args:
        name: of the file.
        text: its words.
        allowed: hashes that may be there.
    """
    problems = []
    found = PATH.search(text)
    if found:
        problems.append(f"{name} seems to name a path of a machine: {clean(found[1], 60)}")
    hexes = [digits for digits in HEX.findall(text) if digits.lower() not in allowed]
    if hexes:
        problems.append(f"{name} holds {len(hexes[0])} hex digits that are no hash of a released file: a key?")
    return problems
