"""The same models in PyTorch, and the two ways to train many of them: eager, and `torch.func`."""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed import workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# How many trials one vmap holds: the transformer's activations are some 20 MB for each.
WIDTH = {"cpu": 64, "cuda": 512}[DEVICE]


class Images(nn.Module):
    """Two convolutions, an average over 2 x 2 pixels, a dense layer; images (batch, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


class Layer(nn.Module):
    """A causal attention and a feedforward branch, each Norm(x + f(x)).

    The fused attention has no batching rule: vmap would fall back to a loop.
    """

    def __init__(self, width: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.norm_feedforward = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        split = (batch, time, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x).reshape(split).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            hidden = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, time, width)
        x = self.norm_attention(x + self.project(mixed))
        hidden = F.gelu(self.expand(x), approximate="tanh")
        return self.norm_feedforward(x + self.contract(hidden))


class Bytes(nn.Module):
    """The causal transformer over bytes; tokens (batch, time) to logits (batch, time, 256)."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.positions = nn.Parameter(torch.randn(64, 32) * 32**-0.5)
        self.layers = nn.Sequential(*(Layer(32, 2, fused) for _ in range(4)))
        self.head = nn.Linear(32, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(tokens) + self.positions))


def model(name: str, fused: bool = True) -> nn.Module:
    """The model of a workload, on the device; attention fused or written out."""

    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    makers = {
        "mlp": lambda: mlp(128),
        "tiny": lambda: mlp(16),
        "cnn": Images,
        "lm": lambda: Bytes(fused),
    }
    return makers[name]().to(DEVICE)


class Batches:
    """Batches from data on the device: epochs shuffled without replacement, or windows of text."""

    def __init__(self, name: str) -> None:
        data = workloads.CASES[name].build().data
        self._text = name == "lm"
        if self._text:
            self._train = torch.tensor(np.asarray(data["train"]), device=DEVICE)
            self._offsets = torch.arange(65, device=DEVICE)
            return
        x = np.array(data["train"]["x"])
        x = x.transpose(0, 3, 1, 2) if name == "cnn" else x
        self._x = torch.tensor(np.ascontiguousarray(x), device=DEVICE)
        self._y = torch.tensor(np.array(data["train"]["y"]), dtype=torch.int64, device=DEVICE)
        self._size = {"mlp": 128, "tiny": 16, "cnn": 32}[name]
        self._place = len(self._x)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs, and the labels of each output."""
        if self._text:
            starts = torch.randint(0, len(self._train) - 64, (16, 1), device=DEVICE)
            windows = self._train[starts + self._offsets].long()
            return windows[:, :-1], windows[:, 1:]
        if self._place + self._size > len(self._x):
            self._order = torch.randperm(len(self._x), device=DEVICE)
            self._place = 0
        rows = self._order[self._place : self._place + self._size]
        self._place += self._size
        return self._x[rows], self._y[rows]


def mean_loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Eager:
    """One step after another, as tutorials do; steps are left out for `budget` seconds."""

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        self._name, self._num_steps = name, num_steps
        self.facts: dict[str, Any] = {}
        self._rates = workloads.rates(name, num_trials)
        self._batches = Batches(name)
        whole = num_trials * num_steps
        self.trial_steps = min(5, whole)
        self.train()
        start = time.perf_counter()
        self.trial_steps = min(20, whole)
        self.train()
        each = (time.perf_counter() - start) / self.trial_steps
        self.trial_steps = min(whole, max(20, int(budget / each)))

    def train(self) -> None:
        left = self.trial_steps
        for rate in self._rates:
            net = model(self._name)
            momentum = workloads.MOMENTUM
            optimizer = torch.optim.SGD(net.parameters(), lr=float(rate), momentum=momentum)
            for _ in range(min(left, self._num_steps)):
                x, y = self._batches.next()
                optimizer.zero_grad()
                mean_loss(net(x), y).backward()
                optimizer.step()
            left -= self._num_steps
            if left <= 0:
                break
        _wait()


class Vmapped:
    """All trials side by side: `vmap` over `grad` of `functional_call`, weights stacked.

    Common batches, momentum by hand; steps are left out for `budget` seconds.
    """

    def __init__(self, name: str, num_trials: int, num_steps: int, budget: float) -> None:
        width = min(num_trials, WIDTH)
        net = model(name, fused=False)
        self._weights = {
            key: value.detach()[None].repeat(width, *[1] * value.ndim)
            for key, value in net.named_parameters()
        }
        self._momenta = {key: torch.zeros_like(value) for key, value in self._weights.items()}
        self._rates = torch.tensor(workloads.rates(name, num_trials)[:width], device=DEVICE)
        self._batches = Batches(name)

        def loss(weights: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return mean_loss(torch.func.functional_call(net, weights, (x,)), y)

        self._gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
        self._steps = 2
        self.train()
        start = time.perf_counter()
        self.train()
        each = (time.perf_counter() - start) / self._steps
        rounds = -(-num_trials // width)
        self._steps = max(1, min(num_steps * rounds, int(budget / each)))
        self.trial_steps = self._steps * width
        self.facts = {"side_by_side": width}

    def train(self) -> None:
        for _ in range(self._steps):
            gradients = self._gradients(self._weights, *self._batches.next())
            with torch.no_grad():
                for key, weight in self._weights.items():
                    rates = self._rates.reshape(-1, *[1] * (weight.ndim - 1))
                    momentum = self._momenta[key].mul_(workloads.MOMENTUM).add_(gradients[key])
                    weight.sub_(rates * momentum)
        _wait()


def setup(num_threads: int) -> dict[str, Any]:
    """Sets the threads; the version and the device."""
    torch.set_num_threads(num_threads)
    return {"torch": torch.__version__, "device": DEVICE, "threads": torch.get_num_threads()}
