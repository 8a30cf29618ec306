"""What a model that sees images gets wrong, and what its records do."""

from tests.mutants import Mutant

LAWS = ("tests/laws/test_vision.py", "tests/laws/test_private_vision.py")
FILES = ("tests/units/test_images.py",)
RECORDS = ("tests/units/test_vision_records.py",)

VISION = (
    Mutant(
        "all linear layers are adapted, what sees too",
        "common/models/targets.py",
        "language = parts.within(network, parts.language_model(network))",
        'language = ""',
        LAWS,
    ),
    Mutant(
        "the blocks that see texts packed are the largest ones, which may be the tower's",
        "common/models/packing.py",
        "self._blocks = blocks(parts.language_model(network))",
        "self._blocks = blocks(network)",
        LAWS,
    ),
    Mutant(
        "the logits of an image's tokens are computed",
        "common/models/token_losses.py",
        "parts.language_model(network) if parts.sees(network) else self._body",
        "self._body",
        LAWS,
    ),
    Mutant(
        "the probe forgets that hooks are there, and they are put on again",
        "client_app/probe.py",
        "for own in attributes.values() if isinstance(own, dict)]",
        'for name, own in attributes.items() if name == "_buffers"]',
        LAWS,
    ),
    Mutant(
        "what sees is trained with the gradients of images for those of examples",
        "client_app/privacy.py",
        "if model.seeing and not math.isinf(bound):",
        "if False:",
        LAWS,
    ),
    Mutant(
        "nodes that show their images otherwise have one base",
        "common/models/base.py",
        "if support.sees(_from_hub(AutoConfig, model)) else",
        "if False else",
        LAWS,
    ),
    Mutant(
        "a path may leave the folder of the data",
        "common/sources/images.py",
        "inside = file.is_relative_to(root)",
        "inside = True",
        FILES,
    ),
    Mutant(
        "a link may leave the folder of the data",
        "common/sources/images.py",
        "file = (root / path).resolve(strict=True)",
        "file = (root / path).absolute()",
        FILES,
    ),
    Mutant(
        "an image is unfolded whatever it says of its size",
        "common/sources/images.py",
        "self._check_size(*opened.size)",
        "pass",
        FILES,
    ),
    Mutant(
        "a record's words may hold the mark that the model puts images at",
        "common/tasks/vision.py",
        "for mark in {MARK, self._eyes.mark} - (",
        "for mark in {MARK} - (",
        RECORDS,
    ),
    Mutant(
        "an image that is cut off goes into the batch",
        "common/tasks/vision.py",
        "if end <= left))",
        "if end))",
        RECORDS,
    ),
    Mutant(
        "an image that the template does not write is passed over",
        "common/tasks/vision.py",
        "if not least <= got <= most:",
        "if got > most:",
        RECORDS,
    ),
    Mutant(
        "a text is lost in a template that takes parts alone",
        "common/tasks/turns.py",
        "if _in_parts_alone(tokenizer):",
        "if False:",
        RECORDS,
    ),
)
