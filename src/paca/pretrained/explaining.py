"""What transformers and the hub's client raise while a model is loaded, as one clear message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from paca.messages.errors import PacaError, first_line, is_failure
from paca.pretrained.gguf import check_file
from paca.pretrained.hub import causes, refusal, unreachable, without_waiting
from paca.pretrained.location import TOKENIZER_FILES, Location, neighbour_hint, tokenizer_files

_OTHER_TOKENIZER = (
    "To take a tokenizer from elsewhere, name its folder or hub id: as model.tokenizer in the YAML of a run, or as the "
    "argument tokenizer of load_pretrained."
)
_ADVICE = {
    "model": "Is it a complete checkpoint, and of the kind that is to be trained: a language model, or one of images?",
    "tokenizer": _OTHER_TOKENIZER,
    "image processor": "Is it a model of images? Then copy preprocessor_config.json of its processor into the folder.",
}


@contextmanager
def explaining(location: Location, revision: str | None, what: str = "model") -> Iterator[None]:
    """Turn the loaders' errors into one clear message, and don't let them wait for a hub that does not answer."""
    try:
        with nullcontext() if location.source != "hub" else without_waiting(location.name_or_path, revision):
            yield
    except BaseException as error:
        if isinstance(error, PacaError) or not is_failure(error):
            raise
        name = location.name_or_path
        if location.source == "hub":
            raise PacaError(_hub_message(name, what, error)) from error
        advice = _ADVICE[what]
        if location.source == "gguf":
            check_file(name)
        if what == "model" and location.source == "folder":
            _check_files(Path(name))
        if what == "tokenizer" and location.source == "folder" and not tokenizer_files(Path(name)):
            raise PacaError(
                f"The folder {name!r} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there. Copy the "
                f"files of the model's tokenizer into it. {advice}"
            ) from error
        raise PacaError(f"The {what} in {name!r} cannot be loaded: {_reason(error, what)}\n{advice}") from error


def _check_files(folder: Path) -> None:
    """Raise `PacaError` for a file of weights that can't be read, naming it."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise PacaError(
                f"{str(file)!r} is incomplete or damaged: {first_line(error)}. Download or copy it again."
            ) from error


def _hub_message(name: str, what: str, error: BaseException) -> str:
    chain = causes(error)

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in chain)

    if caused_by(GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"{name!r} is gated on the hub. Accept its terms there, then log in with `hf auth login`."
    if caused_by(RevisionNotFoundError):
        return f"{name!r} exists on the hub, but not in this revision."
    if caused_by(RepositoryNotFoundError):
        return (
            f"There is no {name!r}: no such file or folder here, and no such (public) repository on the hub."
            f"{neighbour_hint(name)} Check the name; for a private repository log in with `hf auth login`."
        )
    if (answered := refusal(name, error)) is not None:
        return answered
    if "couldn't connect" in str(error).lower() or caused_by(ConnectionError):
        return unreachable(name)
    advice = f"\n{_OTHER_TOKENIZER}" if what == "tokenizer" else ""
    return f"The {what} {name!r} on the hub cannot be loaded: {_reason(error, what)}{advice}"


def _reason(error: BaseException, what: str) -> str:
    """The first line of the error; for a tokenizer all of it, as transformers lists there what it looked for."""
    return " ".join(str(error).split()) or type(error).__name__ if what == "tokenizer" else first_line(error)
