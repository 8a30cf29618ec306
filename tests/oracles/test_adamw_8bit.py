"""AdamW with 8-bit moments steps as AdamW does, and keeps a quarter of what it keeps."""

import torch

from strategies.optimizers import AdamW, AdamW8bit, Group


def trained(optimizer, steps=40):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 128, generator=generator)
    parameter = torch.nn.Parameter(torch.zeros_like(target))
    built = optimizer.build([], Group([parameter], 0.05), Group([], 0.05))
    for _ in range(steps):
        built.zero_grad()
        (parameter - target).square().sum().backward()
        built.step()
    held = sum(value.nbytes for value in built.state[parameter].values() if torch.is_tensor(value) and value.dim())
    return parameter.detach(), held


def test_it_steps_as_adamw_does_in_a_quarter_of_the_memory():
    (exact, held), (short, less) = trained(AdamW(weight_decay=0.1)), trained(AdamW8bit(weight_decay=0.1))
    assert float((short - exact).norm()) < 0.05 * float(exact.norm())
    assert less < 0.3 * held
