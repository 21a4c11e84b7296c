"""What a comparison is, and its folder: who comes again with other settings is told what differs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from paca.comparison.flags import Rates
from paca.comparison.kept_rows import ROWS
from paca.comparison.methods import Method, own_section
from paca.comparison.own_keys import notes_on_own, refuse_own, without_own
from paca.comparison.schedule import Job
from paca.data.file_content import hash_of, samples_of
from paca.data.sources import Source
from paca.messages.errors import PacaError
from paca.messages.shown import setting
from paca.pretrained.claims import Claim
from paca.pretrained.whole_output import write_whole
from paca.training.config.adapter_settings import goes_by_data
from paca.training.config.config_file import load_run_config
from paca.training.config.learning_rate import AUTO
from paca.training.config.run_config import CalibrationSection, RunConfig
from paca.training.config.strict_yaml import read_yaml
from paca.training.folder.run_folder import RunFolder, read_record
from paca.training.trainers.reward_functions import reward_files


@dataclass
class Comparison:
    """Methods, rates and seeds, and the folder that it all goes to."""

    path: Path
    common: dict[str, dict[str, Any]]
    """The sections of the run's YAML."""
    methods: list[Method]
    """As asked for; the first is the one that the others follow and are measured against."""
    rates: Rates
    seeds: list[int]
    equal: tuple[str, ...] = ()
    """What is made the same: `parameters` or `memory`, `time`, or one of those two and `time`; or nothing."""
    extend: bool = True
    """Go beyond a grid of rates while its edge is the best."""

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)

    def folder(self, job: Job) -> RunFolder:
        """Of a run."""
        return RunFolder(self.runs / job.name)

    @property
    def runs(self) -> Path:
        """The folder of the runs' folders."""
        return self.path / "runs"

    def claim(self, name: str) -> Claim:
        """On a run, by its name, or on another part of the work."""
        return Claim(self.path / "claims" / f"{name}.lock")

    def config_path(self, job: Job) -> Path:
        """Of the YAML of a run."""
        return self.path / "configs" / f"{job.name}.yaml"

    def config_file(self, job: Job) -> Path:
        """The same; it is written if need be."""
        path, folder = self.config_path(job), self.folder(job).path
        sections = run_sections(self.common, self.method(job.method), job.rate, job.seed, folder)
        if folder.is_dir() and path.is_file():  # begun, perhaps by a call with other rates or seeds
            sections["eval"] = read_yaml(path)[0]["eval"]
        elif sections["eval"].get("metric") is not None and job != self._first:
            sections["eval"]["before"] = False  # the model as it came is the same for all: one run scores it
        return write_config(path, sections)

    def grids(self) -> dict[str, list[float]]:
        """The rates of each method, as `paca.comparison.prepare` left them."""
        grids = {method.name: self.rates.of(method.name) for method in self.methods}
        return {name: grid for name, grid in grids.items() if grid is not None}

    @property
    def _first(self) -> Job:
        name = self.methods[0].name
        return Job(name, self.grids()[name][0], self.seeds[0])


def load_common(path: Path, overrides: Iterable[str] = ()) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The sections that all runs share, and a sentence on each setting of the YAML that a comparison has no use for.

    Args:
        path: The YAML of a run, as for `paca train`.
        overrides: `"section.key=value"` each.

    Raises:
        PacaError: The config is wrong, or has no held-out data, or a setting is overridden that comes from elsewhere.
    """
    overrides = list(overrides)
    config = load_run_config(path, overrides, to_train=True)
    refuse_own(overrides)
    if config.data.eval is None:
        raise PacaError(
            f"{path}: data.eval is missing. Methods are compared by held-out data: give a file, a fraction such as 0.1 "
            "or a count of records."
        )
    if config.model.adapter is not None:
        raise PacaError(
            f"{path}: model.adapter has no place in a comparison, whose methods all begin anew. Leave it out; to "
            "compare from there on, put the adapter into a model (paca merge), and give that as model.name."
        )
    sections = _plain(config)
    return without_own(sections), notes_on_own(sections)


def check_calibration(common: Mapping[str, Mapping[str, Any]], methods: Iterable[Method]) -> None:
    """Refuse a `calibration` that no method goes by.

    Raises:
        PacaError: It is given, and none does.
    """
    given = common.get("calibration", {})
    if (
        given
        and given != asdict(CalibrationSection())
        and not any(goes_by_data(method.kind, method.settings) for method in methods)
    ):
        raise PacaError(
            "calibration has no effect: none of the methods chooses columns by the data (paca.selection) or starts a "
            "LoRA by it (lora.init_lora_weights). Leave it out."
        )


def run_sections(
    common: Mapping[str, Mapping[str, Any]], method: Method, rate: float | None, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """The sections of one run; without a rate, the one that `paca train` would take.

    A seed sets the data's order, what is drawn at the start, and PaCA's columns.
    """
    sections = method.laid_over(common)
    if not goes_by_data(method.kind, method.settings):  # it is another method's
        sections.pop("calibration", None)
    train = sections.get("train", {})
    if rate is None:
        own = own_section(common)
        same = method.kind == own and common.get(own, {}).items() <= dict(method.settings).items()
        rate = train.get("learning_rate") if same else None  # the YAML's; other methods want other rates
    sections["train"] = {**train, "learning_rate": AUTO if rate is None else rate, "seed": seed}
    if method.kind == "paca":
        sections["paca"]["random_seed"] = seed
    sections["eval"] = {**sections.get("eval", {}), "after": True}
    sections["output"] = {"dir": str(folder.absolute())}
    return sections


def write_config(path: Path, sections: Mapping[str, Any]) -> Path:
    """Write the YAML of a run; one that is there with the same text stays."""
    text = yaml.safe_dump(dict(sections), sort_keys=False, allow_unicode=True, width=120)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)
    return path


class SettingsFile:
    """`settings.json` of the folder: what was asked for, and what each method came out as."""

    def __init__(self, asked: Comparison) -> None:
        """Args:
        asked: The comparison; its folder's file is meant.
        """
        self.path = asked.path / "settings.json"
        self._asked = _asked(asked)
        self._kept: dict[str, Any] = {"methods": {}, "came_out": {}}
        self._begun = asked.runs.is_dir() or (asked.path / ROWS).is_file()

    def read(self) -> dict[str, Any]:
        """What came out before, by method; empty for a new comparison.

        Raises:
            PacaError: There are runs in the folder, or their rows, and they were made with other settings; names what
                differs. Or nothing says with which. Or it is the folder of a run.
        """
        if not self.path.is_file():
            if RunFolder(self.path.parent).finished():
                raise PacaError(f"{self.path.parent} is the folder of a run. Give another --output.")
            if (self.path.parent / ROWS).is_file():
                raise PacaError(
                    f"{self.path.parent} holds the rows of runs ({ROWS}), and no {self.path.name} that says what they "
                    "are. Give another --output."
                )
            return {}
        before = read_record(self.path)
        if not {"asked", "came_out"} <= before.keys():
            raise PacaError(f"{self.path} is damaged, so nothing says what its runs are. Give another --output.")
        asked, now = before["asked"], self._asked
        asked = {**asked, "run": without_own(asked["run"])}  # they may come and go, as they have no effect
        asked["methods"] = {name: without_own(sections) for name, sections in asked["methods"].items()}
        shared = asked["methods"].keys() & now["methods"].keys()
        one, other = ({**each, "methods": {name: each["methods"][name] for name in shared}} for each in (asked, now))
        before_files, now_files = one.pop("content", {}), other.pop("content", {})
        changed = [f"  {key}: {setting(was)} → {setting(is_now)}" for key, was, is_now in _differences(one, other)]
        changed += [
            f"  the content of {name} is not what it was"
            for name, content in now_files.items()
            if before_files.get(name, content) != content
        ]
        if not changed:
            self._kept = {"methods": asked["methods"], "came_out": before["came_out"]}
            return before["came_out"]
        if not self._begun:  # another was planned, by a dry run, and not trained
            return {}
        raise PacaError(
            f"{self.path.parent} holds a comparison with other settings:\n"
            + "\n".join(changed)
            + "\nGive another --output. Rates, seeds and further methods may be added to the same one."
        )

    def write(self, came_out: Mapping[str, Any]) -> None:
        """Keep what was asked for and what came out. Methods that an earlier call had stay."""
        asked = {**self._asked, "methods": {**self._kept["methods"], **self._asked["methods"]}}
        content = {"asked": asked, "came_out": {**self._kept["came_out"], **came_out}}
        write_whole(self.path, json.dumps(content, indent=2) + "\n")


def _asked(comparison: Comparison) -> dict[str, Any]:
    # With nothing to be made equal, methods don't follow the first one, and any may come first.
    first = comparison.methods[0].name if comparison.equal else None
    methods = {method.name: method.sections for method in comparison.methods}
    return {
        "run": comparison.common,
        "content": content_of(comparison.common),
        "equal": ",".join(comparison.equal) or None,
        "follow": first,
        "methods": methods,
    }


def content_of(common: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprints of the local files and folders that the config names: the data's, the model's, and those of reward
    functions."""
    data, found = common.get("data", {}), {}
    for function, file in reward_files(common.get("train", {})):
        found[f"train.reward_funcs ({function}, {file})"] = hash_of(file)
    model = common.get("model", {}).get("name")
    train = data.get("train")
    sources = train if isinstance(train, list) else [train]
    for name in (*sources, data.get("eval"), data.get("template"), model):
        path = Path(name).expanduser() if isinstance(name, str) else None
        if path is not None and path.exists():
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            whole = Source(str(name), tuple(files)).fingerprint() if name != model else samples_of(files)
            found[str(name)] = whole
    return found


def _differences(one: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        names: Sequence[str] = sorted(one.keys() | other.keys())
        found = (_differences(one.get(n), other.get(n), f"{key}.{n}" if key else n) for n in names)
        return [difference for differences in found for difference in differences]
    return [] if one == other else [(key, one, other)]


def _plain(config: RunConfig) -> dict[str, dict[str, Any]]:
    sections = config.as_dict()
    sections.pop("output")  # each run has its own
    return {name: values for name, values in sections.items() if values or name == own_section(sections)}
