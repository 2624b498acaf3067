"""Builds moejax/assets/bible_en_es.tsv.xz from Debian's sword-text-kjv and sword-text-sparv.

    python scripts/build_corpus.py [--debs FOLDER] [--output moejax/assets]

Without `--debs` the two packages come by `apt-get download` (run `apt-get update` first). Needs
`dpkg-deb`. The text is deterministic; so is the file, for one version of liblzma. Each line is
`Gen.1.1<TAB>English<TAB>Spanish`; the few verses that one translation does not have are left out.
"""

import argparse
import hashlib
import html
import lzma
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("sword-text-kjv", "sword-text-sparv")
MODULES = {"en": "engKJV2006eb", "es": "spaRV1909eb"}
ASSET = "bible_en_es.tsv.xz"

_DROPPED = re.compile(r"<(note|title)\b[^>]*>.*?</\1>", re.DOTALL)  # footnotes and headings
_DIVINE_NAME = re.compile(
    r"<divineName\b[^>]*>(.*?)</divineName>", re.DOTALL
)  # print has small capitals
_BREAK = re.compile(r"</?(?:lb|lg|l|div|milestone|chapter)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
# Two words without the space between them; a pronoun stays where it is: "guárda<..>lo</..>,".
_GLUED = re.compile(
    r"</(?:w|transChange)>(?=<(?:w|transChange)\b)"
    r"(?!<transChange[^>]*>(?:l[aeo]s?|me|te|se|os|nos)</transChange>[^<])"
)
_USFM = re.compile(
    r"\\\w+\s"
)  # a marker of the source that the conversion to OSIS left: "\nd LORD"
_BOOK = re.compile(r'<div\b[^>]*\bsID=[^>]*\btype="book"')
_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*\bsID=')


def read_entries(module: Path, testament: str) -> Iterator[str]:
    """Yields the raw OSIS entries of a SWORD zText testament in index order.

    `.bzs` has (start, compressed size, size) per block, `.bzv` (block, offset, size) per entry,
    little-endian.
    """
    blocks_bytes = (module / f"{testament}.bzz").read_bytes()
    blocks = [
        zlib.decompress(blocks_bytes[start : start + size])
        for start, size, _ in struct.iter_unpack("<III", (module / f"{testament}.bzs").read_bytes())
    ]
    for block, offset, size in struct.iter_unpack(
        "<IIH", (module / f"{testament}.bzv").read_bytes()
    ):
        yield blocks[block][offset : offset + size].decode("utf-8") if size else ""


def clean(osis: str) -> str:
    """Returns the plain text of an OSIS fragment: no tags, footnotes or headings, single spaces."""
    text = _GLUED.sub(" ", _DROPPED.sub(" ", osis))
    text = _DIVINE_NAME.sub(lambda match: match[1].upper(), text)
    text = _USFM.sub("", _TAG.sub("", _BREAK.sub(" ", text)))
    return " ".join(html.unescape(text).replace("\u00b6", " ").split())


def read_verses(module: Path) -> dict[str, str]:
    """Returns {"Gen.1.1": text} in order: an entry that opens a chapter, then its verses."""
    verses = {}
    for testament in ("ot", "nt"):
        chapter, number = None, 0
        for entry in read_entries(module, testament):
            opened = _CHAPTER.search(entry)
            if opened:
                chapter, number = opened[1], 0
            elif _BOOK.search(entry):
                chapter = None
            elif chapter is not None:
                number += 1
                verses[f"{chapter}.{number}"] = clean(entry)
    return verses


def build(library: Path) -> bytes:
    """Returns the lines of the asset from an unpacked SWORD library (`usr/share/sword`)."""
    texts = library / "modules" / "texts" / "ztext"
    english, spanish = (read_verses(texts / MODULES[language]) for language in ("en", "es"))
    if list(english) != list(spanish):
        raise SystemExit(
            "the two modules do not have the same verses in the same order; were they updated?"
        )
    lines = [
        f"{verse}\t{english[verse]}\t{spanish[verse]}\n"
        for verse in english
        if english[verse] and spanish[verse]
    ]
    return "".join(lines).encode("utf-8")


def unpack(debs: Path | None, folder: Path) -> Path:
    """Unpacks the packages in `folder`; returns the SWORD library. `debs` None downloads them."""
    if debs is None:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        debs = folder
    for package in PACKAGES:
        (deb,) = debs.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "root")], check=True)
    return folder / "root" / "usr" / "share" / "sword"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--debs", type=Path, help="folder with the two .deb files")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parents[1] / "moejax" / "assets",
        help="folder to write to",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = build(unpack(arguments.debs, Path(folder)))
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    (arguments.output / ASSET).write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    (arguments.output / "SHA256SUMS").write_text(f"{digest}  {ASSET}\n")
    verses = len(text.splitlines())
    print(
        f"{ASSET}: {verses:,} verses, {len(text):,} bytes, {len(packed):,} packed, sha256 {digest}"
    )


if __name__ == "__main__":
    main()
