"""What a training step gets wrong."""

from tests.mutants import Mutant

TESTS = ("tests/oracles/test_step.py", "tests/units/test_packing.py")

STEP = (
    Mutant(
        "the mean of batches' means: a token of a short batch weighs more",
        "client_app/training.py",
        "return task.sums(model.outputs(batch)).sum() / weight",
        "return task.loss(model.outputs(batch)) / recipe.config.train.accumulation",
        TESTS,
    ),
    Mutant(
        "tokens' gradients are kept as the chunks went by, whatever the tokens weigh",
        "common/models/token_losses.py",
        "return outer[0][:, None].to(gradients.dtype) * gradients, None, None, None",
        "return gradients, None, None, None",
        TESTS,
    ),
    Mutant(
        "a token is predicted from itself",
        "common/models/token_losses.py",
        'chosen = batch["labels"][rows, before + 1]',
        'chosen = batch["labels"][rows, before]',
        TESTS,
    ),
    Mutant(
        "attention takes the tokens of packed texts for one another",
        "common/models/packing.py",
        "return packed.new_zeros(*self.padded, *packed.shape[2:]).index_put(self.places, packed[0])",
        "return packed.new_zeros(*self.padded, *packed.shape[2:]).index_put(self.places, packed[0].roll(1, 0))",
        TESTS,
    ),
)
