"""The models under test and their baseline, found from arguments and manifests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from coldctl.artifacts import layout, manifest, run
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.common.digests import digest_of
from coldctl.common.errors import ModelError
from coldctl.fusing.contributions import free_names
from coldctl.storage.location import Location, locate


@dataclass(frozen=True)
class ModelUnderTest:
    """A model to be measured, with the iteration and the run that made it, if one did."""

    name: str
    model: Model
    run: str | None = None
    iteration: int | None = None

    @cached_property
    def body_digest(self) -> str:
        """Return the digest of its body, as its manifest states it if there is one."""
        checkpoint = open_checkpoint(self.model.folder, self.model.name)
        return checkpoint.manifest["body_digest"] if checkpoint.manifest else body_digest(checkpoint)

    @cached_property
    def files_digest(self) -> str:
        """Return the digest of its config and tokenizer, which decide what the same weights compute."""
        folder = self.model.folder
        names = [name for name in (layout.MODEL_CONFIG, *layout.TOKENIZER_FILES) if folder.has(name)]
        return digest_of({name: manifest.digest_of_reader(folder.open(name)) for name in names})


def models_under_test(references: Sequence[str], revision: str | None) -> list[ModelUnderTest]:
    """Return the models that arguments name: a RUN stands for the fused models of all its iterations.

    They are called `iteration-NNN`, and with several RUNs `RUN/iteration-NNN`. Raises ModelError.
    """
    folders = [locate(reference) for reference in references]
    runs = {folder for folder in folders if run.is_run(folder)}
    run_names: dict[Location, str] = {}
    models = []
    for reference, folder in zip(references, folders, strict=True):
        if folder in runs:
            models += _fused_models(folder, _run_name(folder, run_names), alone=len(runs) == 1)
        else:
            models.append(_single_model(resolve(reference, revision), run_names))
    return models


def _fused_models(folder: Location, run_name: str, *, alone: bool) -> list[ModelUnderTest]:
    places = {number: layout.fused(folder, number) for number in layout.iteration_numbers(folder)}
    models = []
    for number, place in places.items():
        if layout.is_complete(place):
            name = place.parent.name if alone else f"{run_name}/{place.parent.name}"
            models.append(ModelUnderTest(name, Model(name, str(place)), run_name, number))
    if not models:
        raise ModelError(f"{folder} has no fused model yet: run `coldctl fuse` first, or `make iterate`")
    return models


def _single_model(model: Model, run_names: dict[Location, str]) -> ModelUnderTest:
    """Return one model, with its run and iteration if it is a fused model of a RUN."""
    path = locate(model.place)
    enclosing = layout.enclosing_run(path)
    if enclosing is not None:
        for number in layout.iteration_numbers(enclosing):
            if path.resolve() == layout.fused(enclosing, number):
                return ModelUnderTest(model.name, model, _run_name(enclosing, run_names), number)
    return ModelUnderTest(model.name, model)


def _run_name(folder: Location, run_names: dict[Location, str]) -> str:
    """Return the name of a RUN: its directory's name, with a suffix if another RUN in `run_names` has that name."""
    place = folder.resolve()
    if place not in run_names:
        run_names[place] = next(name for name in free_names(place.name) if name not in run_names.values())
    return run_names[place]


def with_unique_names(models: Sequence[ModelUnderTest]) -> list[ModelUnderTest]:
    """Return the models, each renamed with a suffix if an earlier one has the same name."""
    renamed: dict[str, ModelUnderTest] = {}
    for model in models:
        name = next(name for name in free_names(model.name) if name not in renamed)
        renamed[name] = replace(model, name=name)
    return list(renamed.values())


def default_baseline(model: Model) -> Model:
    """Return the base that a model's manifest names, from its RUN or from the Hub. Raises ModelError if it is in neither."""
    document = open_checkpoint(model.folder, model.name).manifest
    if document is None or "base" not in document:
        raise ModelError(f"{model.name} has no manifest that names its base: give --baseline")
    stated = document["base"]
    references = [stated["name"]]
    enclosing = layout.enclosing_run(locate(model.place))
    if enclosing is not None:
        state = run.read(enclosing)
        fused = [str(layout.fused(enclosing, iteration.number)) for iteration in reversed(state.iterations)]
        references = [*fused, state.pretrained, *references]
    for reference in references:
        try:
            base = resolve(reference)
        except ModelError:
            continue
        if ModelUnderTest(base.name, base).body_digest == stated["body_digest"]:
            return base
    raise ModelError(f"the base of {model.name}, {stated['name']!r}, was not found from here: give --baseline")
