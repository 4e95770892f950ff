"""What the doctor looks at in a site's own file: its keys, its data, its base model, its budget. It loads no model."""

from __future__ import annotations

import string
from pathlib import Path

from anyrank.config.sections import DataConfig
from anyrank.data import rows
from anyrank.errors import DataError
from anyrank.parties.findings import Finding
from anyrank.parties.kits import Kit
from anyrank.worker import sitefile
from anyrank.worker.sitefile import SiteData, SiteFile

_PAIRS = (("text", "label"), ("prompt", "completion"))  # columns of the two kinds of texts


def site_file(kit: Kit) -> list[Finding]:
    """That `site.toml` can be read, and is this kit's."""
    site = sitefile.load(kit.site_file)
    if site.name != kit.name:
        words = f"name = {site.name!r}: this kit is that of {kit.name!r}; write name = {kit.name!r}"
        return [Finding("site.toml", False, words)]
    words = f"{kit.site_file}: rank at most {site.limits.rank}, privacy {site.privacy.level}"
    return [Finding("site.toml", True, words), *_budget(site)]


def _budget(site: SiteFile) -> list[Finding]:
    if site.privacy.level == "none":
        return []
    from anyrank.worker.site import spent

    table = spent(site)
    words = f"epsilon {table['spent']:.3g} of {table['granted']:.3g} spent (delta {table['delta']:g})"
    return [Finding("privacy", table["spent"] < table["granted"], words)]


def data(kit: Kit) -> list[Finding]:
    """That the examples can be read, and have the columns that the site file names."""
    own = sitefile.load(kit.site_file).data
    return [_part(own, key) for key in ("source", "test_source") if getattr(own, key)]


def _part(own: SiteData, key: str) -> Finding:
    config, where = DataConfig(**vars(own)), f"data.{key}"
    path = Path(getattr(own, key))
    if path.is_dir() or path.suffix in (".npz", ".npy"):
        words = "there; its contents are read when a run begins" if path.exists() else f"no such file ({where})"
        return Finding("data", path.exists(), f"{path}: {words}")
    splits = rows.open_source(rows.Part(str(path), "", "train", where, "data.split"), config)
    found = [splits[name]() for name in splits][:1]
    if not found or not found[0].rows:
        raise DataError(f"{path}: expected rows of data, got none ({where})")
    _check_columns(own, found[0].names, f"{path} ({where})")
    if key == "source" and own.person and own.person not in found[0].names:
        raise DataError(f"{path} ({where}): no column {own.person!r}; it names whose each example is: correct data.person")
    return Finding(
        "data", True, f"{path}: {len(found[0].rows):,} examples with the columns {', '.join(map(str, found[0].names))}"
    )


def _check_columns(own: SiteData, names: list[str], where: str) -> None:
    """Raise `DataError` unless the columns of one kind of texts are there."""
    pairs = [_wanted(own, pair) for pair in _PAIRS]
    template = [field for _, field, _, _ in string.Formatter().parse(own.template) if field]
    if template:
        pairs.append(template)
    if own.format != "columns" or any(all(name in names or str(name).isdigit() for name in pair) for pair in pairs):
        return
    lacking = [name for name in pairs[0] if name not in names]
    raise DataError(f"{where}: no column {', '.join(map(repr, lacking))}; it has {', '.join(map(repr, names))}; correct [data]")


def _wanted(own: SiteData, pair: tuple[str, str]) -> list[str]:
    given = [getattr(own, key) for key in pair]
    return [str(name) for each in given for name in (each if isinstance(each, (list, tuple)) else [each])]


def model(kit: Kit) -> list[Finding]:
    """That the base model is there, and which one it is."""
    site = sitefile.load(kit.site_file)
    if not site.model.folder:
        return [Finding("model", True, f"{site.model.name}, as its package has it")]
    from anyrank.worker.siteload import digest_of_model

    digest = digest_of_model(Path(site.model.folder))
    wanted = site.accept.base_model
    if wanted and wanted != digest:
        words = f"{site.model.folder}: SHA-256 {digest}, and accept.base_model = {wanted}; use the model that was agreed on"
        return [Finding("model", False, words)]
    return [Finding("model", True, f"{site.model.folder}: SHA-256 {digest}")]
