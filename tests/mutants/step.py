"""What a training step gets wrong."""

from tests.mutants import Mutant

TESTS = ("tests/oracles/test_step.py", "tests/units/test_packing.py")
CHILDREN = ("tests/runs/test_children.py",)

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
        "the first process computes what the others do, too",
        "client_app/shares.py",
        "items[rank::number]",
        "items[rank :: number if rank else 1]",
        ("tests/units/test_shares.py",),
    ),
    Mutant(
        "a child goes on with what was trained when the round began",
        "client_app/child.py",
        "                group.spread(work.parameters)\n",
        "                group.spread([parameter.clone() for parameter in work.parameters])\n",
        CHILDREN,
    ),
    Mutant(
        "a child's sum is rounded before it is added",
        "client_app/group.py",
        "gradient.detach().double()",
        "gradient.detach().bfloat16().double()",
        CHILDREN,
    ),
    Mutant(
        "a child lives on without its parent",
        "client_app/child.py",
        "    os._exit(0)\n",
        "",
        CHILDREN,
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
    Mutant(
        "a batch of in-batch negatives is cut, and an anchor told from fewer",
        "common/tasks/embed.py",
        "    def divisible(self) -> bool:\n        return self._own\n",
        "    def divisible(self) -> bool:\n        return True\n",
        ("tests/units/test_shares.py",),
    ),
    Mutant(
        "images stay behind where examples cross",
        "client_app/crossing.py",
        "images=tuple(map(_image, images))",
        "images=()",
        ("tests/units/test_shares.py",),
    ),
    Mutant(
        "a child loses patience with the first process",
        "client_app/group.py",
        "WITHOUT_END if rank else PATIENCE",
        "PATIENCE",
        ("tests/units/test_shares.py",),
    ),
    Mutant(
        "an optimizer's state comes back in its parameter's type",
        "client_app/optimizer_state.py",
        "tensor.to(parameter.device, copy=True)",
        "tensor.to(parameter, copy=True)",
        ("tests/laws/test_optimizer_state.py",),
    ),
    Mutant(
        "a state that lies turned begins anew",
        "client_app/optimizer_state.py",
        "sorted(tensor.shape) == sorted(parameter.shape)",
        "tensor.shape == parameter.shape",
        ("tests/laws/test_optimizer_state.py",),
    ),
)
