"""The steps of an export: write, reload, compare, and only then keep the folder."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging as transformers_logging

from common import tasks
from common.error import BouquetError
from common.models import base
from common.record.form import one_lora
from deploy.export import card, comparison, forms, push
from deploy.export.comparison import TOLERANCES, Comparison
from deploy.export.source import Source, find
from deploy.serve import vllm


def export(options: argparse.Namespace) -> int:
    """Do what the command line says. Raises :class:`BouquetError` on what a user can mend."""
    target: Path = options.to
    _check(options)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source = find(options.source, options.node, options.state_directory, options.model)
    if options.push:
        push.check(options.push, source.config.model, merged=options.form == "merged")
    texts = source.texts(options.prompt)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears by one rename, after its check.
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        write = _merged if options.form == "merged" else _peft
        made = write(source, folder, texts, options)
        card.write(made, folder, options.push or target.name)
        folder.rename(target)
    print(f"{target}: {made.check}")
    for line in _next_steps(made, target):
        print(line)
    if options.push:
        print(f"published: {push.push(target, options.push, private=options.private)}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise :class:`BouquetError` on arguments that contradict each other, and on a target that is there."""
    if options.to.exists():
        raise BouquetError("the target already exists", where=str(options.to), cure="Name a new folder with --to.")
    if options.private and not options.push:
        raise BouquetError("nothing is published", where="--private", expected="--push OWNER/NAME", got="none")
    if options.form == "merged" and options.rank is not None:
        raise BouquetError("a merged model has no rank", where="--rank", cure="Leave --rank out, or use --form peft.")
    if options.form == "peft" and options.dtype is not None:
        raise BouquetError(
            "a PEFT folder keeps the adapter's own values", where="--dtype", cure="Leave it out, or use --form merged."
        )


def _peft(source: Source, folder: Path, texts: comparison.Texts, options: argparse.Namespace) -> card.Export:
    """One LoRA, whole or cut."""
    state = whole = one_lora(source.state)
    made, form = f"{whole.rank} in every layer", "peft"
    if options.rank is not None:
        state, energy = forms.cut(source.state, options.rank)
        made, form = (
            f"{state.rank} in every layer, truncated from {whole.rank}, which keeps {energy:.2%} of the energy",
            "cut",
        )
    print(f"rank {made}")
    forms.write_peft(state, source.config, folder)
    config = forms.in_float32(source.config)
    logits = comparison.own(source.state, config, texts, options.device)
    compared = logits.compare(comparison.reloaded(folder, config, texts, options.device))
    _demand(compared, form, options.tolerance)
    return card.Export(source, state.rank, made, str(compared), options.licence)


def _merged(source: Source, folder: Path, texts: comparison.Texts, options: argparse.Namespace) -> card.Export:
    """A whole model; it is held to the same adapter over the same base, not quantised."""
    dtype = options.dtype or "bf16"
    forms.write_merged(source.state, source.config, folder, dtype, options.device)
    plain = forms.unquantised(source.config, "float32")
    logits = comparison.own(source.state, plain, texts, options.device)
    compared = logits.compare(comparison.remerged(forms.at(source.config, folder), texts, options.device))
    _demand(compared, dtype, options.tolerance)
    check = str(compared)
    if (kind := source.config.model.quantization) != "none":
        trained = comparison.own(source.state, forms.in_float32(source.config), texts, options.device)
        check += f"; over the {kind} base that it was trained on, its logits differ by up to "
        check += f"{logits.compare(trained.own).difference:.2g}"
    rank = forms.rank(source.state)
    made = f"{rank or 'that of the weights'}, merged into {dtype} weights"
    return card.Export(source, rank, made, check, options.licence, merged=True)


def _demand(compared: Comparison, form: str, tolerance: float | None) -> None:
    """Raise :class:`BouquetError` where an export is another model than the run's."""
    limit = TOLERANCES[form] if tolerance is None else tolerance
    if not compared.share <= limit:
        cure = {"peft": "", "cut": "Keep a larger --rank", "bf16": "Use --dtype fp16", "fp16": "Use --form peft"}[form]
        raise BouquetError(
            "the export differs from the run's model, and was not kept",
            expected=f"at most {limit:g} of what the adapter changes",
            got=str(compared),
            cure=f"{cure or 'This should not happen: please report it'}, or set a --tolerance.",
        )


def _next_steps(export: card.Export, target: Path) -> Iterator[str]:
    """What serves the folder."""
    config = export.source.config
    if (classes := tasks.classes(config.task)) is None:
        yield "an embedding model: its README.md has the code that loads it"
        return
    if classes:
        yield "a model with a head: its README.md has the code that loads it; vLLM and llama.cpp serve language models"
        return
    if tasks.TASKS[config.task.name].sees:
        yield "a model that takes images: its README.md has the code that loads it"
        return
    place, path = base.location(config.model.name), target.resolve()
    if export.merged:
        yield f"vLLM:  {shlex.join(['vllm', 'serve', str(path)])}"
        yield f"GGUF:  {shlex.join(['python', 'convert_hf_to_gguf.py', str(path), '--outfile', f'{path}.gguf'])}"
        return
    try:
        yield f"vLLM:  {shlex.join(vllm.command(place, {target.name: path}, export.rank))}"
    except BouquetError as error:
        yield f"vLLM:  {error}"
    step = ["python", "convert_lora_to_gguf.py", *(["--base", place] if Path(place).is_dir() else [])]
    yield f"GGUF:  {shlex.join([*step, '--outtype', 'f16', '--outfile', f'{path}.gguf', str(path)])}"
