"""Finds the files of experience, in the given directories the data only.

A downloaded data set has a card, a licence and a description beside its data. They are left out, and
named to the user. Of a data set that Hugging Face ``datasets`` saved, only the files that it lists
are data: the cached ones beside them are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sleeprl.data.records import FORMATS, TEXTS, RecordError, format_of, read_records
from sleeprl.wake.forms import ExperienceError, is_experience

_ABOUT_DATA = re.compile(
    r"(?:readme|licen[cs]e|copying|notice|changelog|citation|contributing)(?:[._-].*)?",
    re.IGNORECASE,
)
"""Names of files that are about the data beside them."""
_STATE = "state.json"
_DESCRIPTIONS = {
    _STATE,
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "croissant.json",
}


def find_files(
    paths: Sequence[str | Path], on_bad: Callable[[ExperienceError], None] | None = None
) -> tuple[list[Path], list[Path]]:
    """Find the files to read.

    Hidden files in a directory are left out of both lists.

    Args:
        paths: Files, directories, or ``-``.
        on_bad: Receives the error of each path that cannot be read, which is then skipped; None
            raises it.

    Returns:
        The readable files, and the files in the given directories that are left out: not data, or
        of a format that cannot be read.

    Raises:
        ExperienceError: A path is empty, does not exist, has an unknown format, or has no readable
            file in it. An empty one is never skipped.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for path in paths:
        if not str(path).strip():
            raise ExperienceError(
                "an empty path (an unset variable?); write . for the current directory"
            )
        try:
            found, others = _find(Path(path))
        except ExperienceError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            files += found
            ignored += others
    return files, ignored


def _find(path: Path) -> tuple[list[Path], list[Path]]:
    try:
        if path.is_dir():
            return _inside(path)
        if str(path) == "-" or (path.is_file() and format_of(path)):
            return [path], []
        exists = path.exists()
    except OSError as error:
        raise ExperienceError(f"{path}: {error.strerror}") from None
    if not exists:
        raise ExperienceError(f"{path}: no such file or directory")
    kinds = ", ".join(FORMATS)
    if path.suffix.lower() in ("", ".gz"):
        raise ExperienceError(
            f"{path}: cannot tell its format; give it a name ending in {kinds} (or these with .gz)"
        )
    raise ExperienceError(
        f"{path}: cannot read this format; convert it to one of {kinds}, or rename it if it is plain text"
    )


def _inside(directory: Path) -> tuple[list[Path], list[Path]]:
    inside = [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    ]
    described = any(
        _ABOUT_DATA.fullmatch(f.name) or f.name in _DESCRIPTIONS for f in inside
    ) and any(format_of(f) not in (None, *TEXTS) and f.name not in _DESCRIPTIONS for f in inside)
    saved = {file.parent: _saved_files(file) for file in inside if file.name == _STATE}

    def is_data(file: Path) -> bool:
        form = format_of(file)
        if form is None or file.name in _DESCRIPTIONS or _ABOUT_DATA.fullmatch(file.name):
            return False
        if form in TEXTS:
            return not described
        listed = saved.get(file.parent)
        return file.name in listed if listed else form != ".json" or _has_records(file)

    data = [file for file in inside if is_data(file)]
    if not data:
        raise ExperienceError(
            f"{directory}: no file ending in {', '.join(FORMATS)} in it that is data; "
            "a file that is given by its own name is read whatever it is called"
        )
    known = set(data)
    return data, [file for file in inside if file not in known]


def _saved_files(state: Path) -> set[str]:
    """Return the names of the data files of a saved data set; empty where it lists none."""
    try:
        values = [value for _, value in read_records(state)]
    except RecordError:
        return set()
    listed = values[0].get("_data_files") if values and isinstance(values[0], dict) else None
    rows = listed if isinstance(listed, list) else []
    return {str(row["filename"]) for row in rows if isinstance(row, dict) and "filename" in row}


def _has_records(file: Path) -> bool:
    """Decide whether a JSON file is data: a list, lines, or an object in one of the forms."""
    try:
        with open(file, "rb") as start:
            if start.read(64).lstrip().startswith(b"["):
                return True  # a list, which may be long, is parsed where it is read
        place, first = next(iter(read_records(file)), ("", None))
    except (RecordError, OSError):
        return True  # the error is reported when it is read
    return place != str(file) or not isinstance(first, dict) or is_experience(first)
