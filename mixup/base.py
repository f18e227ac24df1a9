"""What every method shares: the seam ``draw → mix → loss``, the loss itself, and the targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .settings import ANY, check, setting, settings_of

BLOCK_COUNTS = (2, 4, 8, 16)  # blocks a side, for methods that draw their number
Loss = Callable[[Tensor, Tensor], Tensor]
Model = Callable[..., Any]  # a module; a function is enough where its parameters and its mode are left alone


class _BinaryCrossEntropy(torch.autograd.Function):
    """``F.binary_cross_entropy`` in value and gradient, without its range check, which turns a NaN into an abort of
    the CUDA context instead of a NaN loss the training loop can report."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(probabilities, targets)
        logs = [(-probabilities).log1p_(), probabilities.log()]
        torch._foreach_clamp_min_(logs, -100.0)
        of_others, of_own = torch._foreach_mul(logs, [targets - 1, targets])
        return (of_others - of_own).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        p, t = ctx.saved_tensors
        return grads[0] * (p - t) / ((1 - p) * p).clamp(min=1e-12) / p.numel(), None


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy between softmax(logits) and the target rows, averaged over B·K, in float32.

    Args:
        logits: [B, K] of any floating type.
        targets: [B, K] rows that sum to 1.

    Equals ``F.binary_cross_entropy(softmax(logits.float(), 1), targets)`` in value and gradient; the published
    learning rates belong to this loss, not to cross-entropy.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _BinaryCrossEntropy.apply(torch.softmax(logits.float(), dim=1), targets.float())


@dataclass
class Mixed:
    """What to train on: mixed images, their targets, and the objective.

    Attributes:
        images: [B, C, H, W], in the memory format of the batch; None where only activations are mixed.
        targets: [B, K] rows that sum to 1.
        share: weight of the mixed loss.
        clean_loss: scalar float32, the clean pass's part of the objective, its weight included; 0 without one.
        partner: [B, C, H, W], image b of every pair before it is moved; any strides. For pictures, like the next two:
            None where a method has no such thing.
        saliency: ([B, H, W], [B, H, W]) of image a and image b.
        mask: [B, H, W] weight of image a.
        loss_function: of logits [B, K] and targets [B, K].
        held: the parameters, and the gradients of ``clean_loss`` in them; None without a clean pass.
    """

    images: Tensor | None
    targets: Tensor
    clean_loss: Tensor
    share: float = 1.0
    partner: Tensor | None = None
    saliency: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    loss_function: Loss = field(repr=False, kw_only=True)
    held: tuple[Sequence[Tensor], Sequence[Tensor]] | None = field(default=None, repr=False)

    def loss(self, logits: Tensor) -> Tensor:
        """The whole objective, a scalar: share·L(mixed) + clean_loss.

        Args:
            logits: [B, K] of ``images``.

        Its ``backward`` also gives the parameters the clean loss's gradients, which were computed by ``mix``.
        """
        loss = self.loss_function(check_logits(logits, *self.targets.shape), self.targets)
        if self.share != 1:
            loss = self.share * loss
        if self.held is None:
            return loss
        parameters, gradients = self.held
        # entered after the forward pass: before it, every parameter's gradient would be ready last, and processes could
        # not exchange those of one layer while the next is computed
        return loss + HeldGradients.apply(self.clean_loss, gradients, *parameters)


def check_logits(output: Any, batch: int, num_classes: int | None = None) -> Tensor:
    """What a network gave, if it is logits [B, K]; else a ``ValueError`` that says so."""
    fits = isinstance(output, Tensor) and output.ndim == 2 and len(output) == batch
    if fits and num_classes in (None, output.shape[1]):
        return output
    shape = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ValueError(f"the network must return one tensor of logits [{batch}, {num_classes or 'K'}], not {shape}")


class HeldGradients(torch.autograd.Function):
    """A value whose gradients in ``parameters`` are known already: backward hands them out, times what arrives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, arriving[0])


@dataclass
class Step:
    """One batch through mixing and network.

    Attributes:
        loss: the whole objective, a scalar for ``backward()``.
        logits: [B, K] of the (mixed) pass, row i belonging to ``labels[i]`` as image a.
        mixed: what the network was trained on. The published mixed loss is ``(loss − mixed.clean_loss)/mixed.share``.
    """

    loss: Tensor
    logits: Tensor
    mixed: Mixed

    def detached(self) -> Step:
        """The same numbers without autograd's graph and without held gradients."""
        return Step(self.loss.detach(), self.logits.detach(), replace(self.mixed, held=None))


@dataclass
class Method:
    """A training method: ``draw → mix → loss``.

        draws = method.draw(rng, batch=len(images), height=32, width=32)
        mixed = method.mix(model, images, labels, draws)
        loss = mixed.loss(model(mixed.images))
        loss.backward()

    A subclass is a dataclass whose fields are its settings (``mixup.settings.setting``), named like the command-line
    flags. It defines ``_draw`` and ``_mix``; ``draw`` and ``mix`` check what they are given, and call them. No method
    touches ``.grad`` or leaves a module in another mode: a pass runs in the modes the modules are in, unless the method
    says eval mode, and then each module gets its mode back.

    Attributes:
        num_classes: K.
        mean, std: one number a channel, or one for all: what images were normalised with, for pixels in [0, 1]; needed
            by methods that look at pixels.
        seed: of ``rng``, the NumPy generator that ``mix`` and ``step`` draw from where they are given no draws. Several
            processes need a seed each.
        epoch: of those draws, from 0; ``mix_schedule`` looks at it.
        loss: of logits [B, K] and target rows [B, K]; the paper's binary cross-entropy, unless another is assigned, as
            in ``method.loss = torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # in tables and pictures
    recordable: ClassVar[bool] = False  # draws steer ``mix`` as tensors alone, so that a step can be a CUDA graph
    takes_saliency: ClassVar[bool] = False  # from a pass through the network, or handed over
    needs_colours: ClassVar[bool] = False  # mean and std
    loss = staticmethod(bce_loss)
    epoch = 0

    num_classes: int
    mean: Sequence[float] | None = field(default=None, kw_only=True)
    std: Sequence[float] | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """The settings that are not given by the user, for ``dataset``."""
        return {name: known.preset(dataset) for name, known in settings_of(cls).items() if known.presets}

    def __post_init__(self) -> None:
        for name, value in self.presets("").items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check(self)
        self.rng = np.random.default_rng(self.seed)
        if self.mean is not None and self.std is not None:
            lengths = {len(self.mean), len(self.std)}
            if 0 in lengths or len(lengths - {1}) > 1:
                raise ValueError(f"mean and std must have a value for each channel, or one: {self.mean}, {self.std}")
        if self.std is not None and not min(self.std) > 0:
            raise ValueError(f"mean and std: std must be positive: {self.std}")

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> Any:
        """Every random choice for a batch of ``batch`` images of ``height`` × ``width`` in epoch ``epoch`` (from 0)."""
        if not isinstance(rng, np.random.Generator):
            raise ValueError(f"rng must be a NumPy generator, as of numpy.random.default_rng(0), not {rng!r}")
        return self._draw(rng, batch, height, width, epoch)

    def mix(
        self, model: Model | None, images: Tensor, labels: Tensor, draws: Any = None, *, saliency: Tensor | None = None
    ) -> Mixed:
        """What to train on.

        Args:
            model: maps images to logits [B, K]; may be None with ``saliency``, or for a method without a saliency pass.
            images: [B, C, H, W] normalised, floating.
            labels: [B] integers in [0, K), or [B, K] floating rows, which are mixed as they are.
            draws: of ``draw``, or any object with the same attributes, numbers or tensors; None: drawn from ``rng``.
            saliency: [B, H, W] ≥ 0, maps in place of the network's gradient, for SAGE, Puzzle Mix and Co-Mixup. There
                is no clean pass then: ``clean_loss`` is 0, and the mixed loss is the whole objective.

        Raises:
            ValueError: an argument that is none of these.
        """
        if saliency is None and self.takes_saliency and not callable(model):
            raise ValueError(
                f"{self.title} takes saliency from a network, not from {model!r}: hand it over, or saliency=maps"
            )
        labels, draws = self._checked(images, labels, draws, saliency)
        return self._mix(cast(Model, model), images, labels, draws, saliency)

    def step(
        self, model: Model, images: Tensor, labels: Tensor, draws: Any = None, *, saliency: Tensor | None = None
    ) -> Step:
        """``mix``, the network's pass over the mixed images, and the loss; arguments as ``mix``."""
        mixed = self.mix(model, images, labels, draws, saliency=saliency)
        logits = model(mixed.images)
        return Step(mixed.loss(logits), logits, mixed)

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> Any:
        """``draw`` of a method."""
        raise NotImplementedError

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: Any, saliency: Tensor | None) -> Mixed:
        """``mix`` of a method: ``labels`` are [B] int64 or [B, K] float32, and there are draws."""
        raise NotImplementedError

    def _checked(self, images: Tensor, labels: Tensor, draws: Any, saliency: Tensor | None) -> tuple[Tensor, Any]:
        """Labels as int64 or float32, and draws, once all that was given fits. Nothing on a GPU is waited for."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be a floating tensor [B, C, H, W], not {_described(images)}")
        if self.needs_colours and {len(colour) for colour in self.colours()} - {1, images.shape[1]}:
            raise ValueError(f"mean and std must have one value or {images.shape[1]}: {self.mean}, {self.std}")
        labels = self._checked_labels(labels, len(images))
        if saliency is not None:
            if not self.takes_saliency:
                raise ValueError(f"{self.title} takes no saliency")
            if saliency.shape != images[:, 0].shape or not saliency.is_floating_point():
                shape = list(images[:, 0].shape)
                raise ValueError(f"saliency must be a floating tensor {shape}, not {_described(saliency)}")
            if saliency.device.type == "cpu" and (saliency < 0).any():
                raise ValueError(f"saliency must not be negative: {float(saliency.min())}")
        if draws is None:
            height, width = images.shape[2:]
            draws = self.draw(self.rng, len(images), height, width, self.epoch)
        drawn = getattr(draws, "permutation", getattr(draws, "prior", None))
        if drawn is not None and not self._suits(len(drawn), len(images)):
            raise ValueError(f"draws for {len(drawn)} images do not fit a batch of {len(images)}: draw for each batch")
        return labels, draws

    def _suits(self, drawn: int, batch: int) -> bool:
        """Whether draws for so many images may be of a batch."""
        return drawn == batch

    def _checked_labels(self, labels: Tensor, batch: int) -> Tensor:
        """[B] int64 or [B, K] float32; the range is looked at on the CPU alone, because a GPU would be waited for."""
        rows = f"[{batch}, {self.num_classes}]"
        expected = f"labels must be [{batch}] integers from 0 to {self.num_classes - 1}, or floating rows {rows}"
        if not isinstance(labels, Tensor):
            raise ValueError(f"{expected}, not {_described(labels)}")
        if labels.is_floating_point() and labels.shape == (batch, self.num_classes):
            return labels.float()
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex() or labels.shape != (batch,):
            raise ValueError(f"{expected}, not {_described(labels)}")
        labels = labels.long()
        if labels.device.type == "cpu" and batch:
            low, high = (int(x) for x in torch.aminmax(labels))
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{expected}, not {_described(labels)} from {low} to {high}")
        return labels

    def mixed(self, images: Tensor | None, targets: Tensor, clean: Clean | None = None, **rest: Any) -> Mixed:
        """A ``Mixed`` with this method's loss and, if there was one, the held gradients of a clean pass."""
        if clean is None:
            rest["clean_loss"] = torch.zeros((), device=targets.device)
        else:
            rest |= {"clean_loss": clean.loss, "held": (clean.parameters, clean.gradients)}
        return Mixed(images, targets, loss_function=self.loss, **rest)

    def unmixed(self, images: Tensor, labels: Tensor) -> Mixed:
        """A batch as it is, with one-hot targets."""
        return self.mixed(images, one_hot(labels, self.num_classes))

    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """``mean`` and ``std``; ``ValueError`` where they are not known."""
        if self.mean is None or self.std is None:
            raise ValueError(
                f"{self.title} looks at pixels: give mean and std, one a channel for pixels in [0, 1], e.g. "
                f'build_method("{self.name}", …, mean=…, std=…); those of ImageNet are (0.485, 0.456, 0.406) and '
                "(0.229, 0.224, 0.225)"
            )
        return tuple(self.mean), tuple(self.std)


def _described(value: Any) -> str:
    """A tensor's type and shape, or what else it is."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@dataclass
class Clean:
    """A clean pass's part of the objective, a scalar with its weight, and its gradients in ``parameters``."""

    loss: Tensor
    parameters: Sequence[Tensor] = ()
    gradients: Sequence[Tensor] = ()


def kept(make: Callable[..., Any]) -> Any:
    """``make`` as a function whose tensors, which nobody changes, are made once for each device and size."""
    return functools.lru_cache(torch.inference_mode(False)(make))


@kept
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One float32 number a channel as [C, 1, 1]."""
    return to_device(values, device, torch.float32).view(-1, 1, 1)


@kept
def counting(number: int, device: torch.device) -> Tensor:
    """0, 1, … number − 1 as int64."""
    return torch.arange(number, device=device)


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, an array or a tensor as tensor on ``device``, without waiting for it."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory a copy may wait for all that was launched before
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> NDArray:
    """A tensor as NumPy array; waits for the device. NumPy has no bfloat16: float32 stands for it."""
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


@dataclass
class PairDraws:
    """λ, and which images are mixed.

    Attributes:
        lam: share of image a, in [0, 1].
        permutation: [m] integers; of the last m images of the batch, image i is mixed with image ``permutation[i]``.
    """

    lam: float
    permutation: NDArray[np.int64]


def alpha(value: float, tiny: float | None = None) -> Any:
    """The setting ``mixup_alpha``, with a method's preset, and one of its own for Tiny-ImageNet-200."""
    presets = {ANY: value} if tiny is None else {ANY: value, "tiny-imagenet-200": tiny}
    return setting(None, "λ ~ Beta(alpha, alpha)", low=0, presets=presets)


@dataclass
class PartialMixing(Method):
    """A method that can mix only the last int(B·p) images of a batch, among themselves, and leave the others clean.

    ``mixup_alpha`` is α of λ ~ Beta(α, α), one λ a batch; with 0, λ is always 1: image a alone.
    """

    mixup_alpha: float = alpha(1.0)
    prob_mix: float = setting(1.0, "share of each batch that is mixed", low=0, high=1)
    mix_schedule: str = setting(
        "fixed", "how that share grows: fixed, scheduled, delayed", choices=("fixed", "scheduled", "delayed")
    )
    mix_scheduled_epoch: int = setting(300, "epoch at which it is reached", low=1)

    def mixed_count(self, batch: int, epoch: int) -> int:
        """How many images at the end of a batch are mixed in ``epoch`` (from 0).

        "scheduled": the share grows linearly until ``mix_scheduled_epoch``; "delayed": it is 0 before that epoch.
        """
        share = self.prob_mix
        if self.mix_schedule == "scheduled":
            share *= min(1.0, (epoch + 1) / self.mix_scheduled_epoch)
        elif self.mix_schedule == "delayed" and epoch < self.mix_scheduled_epoch:
            share = 0.0
        return int(batch * share)

    def _suits(self, drawn: int, batch: int) -> bool:
        """Whether so many images of a batch may be mixed; with a schedule, in any epoch."""
        return drawn == self.mixed_count(batch, 0) if self.mix_schedule == "fixed" else drawn <= batch

    def draw_lam(self, rng: np.random.Generator) -> float:
        """λ, the share of image a."""
        return rng.beta(self.mixup_alpha, self.mixup_alpha) if self.mixup_alpha > 0 else 1.0

    def draw_permutation(self, rng: np.random.Generator, batch: int, epoch: int) -> NDArray[np.int64]:
        """A permutation of the images that are mixed."""
        return rng.permutation(self.mixed_count(batch, epoch))


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """[B] integer labels to [B, K] float32 rows; rows stay as they are."""
    if labels.is_floating_point():
        return labels
    # comparison instead of F.one_hot, which reads the largest label back to the host
    rows = torch.empty(len(labels), num_classes, dtype=torch.float32, device=labels.device)
    return torch.eq(labels[:, None], counting(num_classes, labels.device), out=rows)


def mixed_targets(labels: Tensor, permutation: Tensor, ratio: Tensor | float, num_classes: int) -> Tensor:
    """ratio·y + (1 − ratio)·y[P] as [B, K]; ``ratio`` is one number or [B], the share of image a."""
    return mixed_rows(one_hot(labels, num_classes), permutation, ratio)


def mixed_rows(rows: Tensor, permutation: Tensor, ratio: Tensor | float) -> Tensor:
    """``mixed_targets`` of target rows [B, K]."""
    # lerp keeps rows exact whose image is its own partner
    return torch.lerp(rows[permutation], rows, as_share(ratio, rows.device).reshape(-1, 1))


def as_share(value: Any, device: torch.device) -> Tensor:
    """A number, or a tensor, as float32 tensor on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    # filled there: copying a number to a GPU would wait for it
    return torch.full((), float(value), dtype=torch.float32, device=device)


def as_index(permutation: Any, device: torch.device) -> Tensor:
    """A permutation given as array, list or tensor, as int64 on ``device``."""
    return to_device(permutation, device, torch.int64)


def partner_index(permutation: Any, batch: int, device: torch.device) -> Tensor:
    """[B] int64 on ``device``: the position of every image's partner when the last m = len(permutation) images of a
    batch are permuted among themselves. The images in front of them stay clean: each is its own partner."""
    index = as_index(permutation, device)
    clean = batch - len(index)
    if clean < 0:
        raise ValueError(f"a permutation of {len(index)} does not fit a batch of {batch}")
    return torch.cat([counting(clean, device), index + clean]) if clean else index


def behind(front: Tensor | int, rows: Tensor, value: float = 0.0) -> Tensor:
    """``rows`` [m, …] behind ``front``: other rows, or so many rows of ``value``. What stayed clean is in front."""
    if not isinstance(front, Tensor):
        front = rows.new_full((front, *rows.shape[1:]), value) if front else rows[:0]
    return torch.cat((front, rows)) if len(front) else rows


def laid_out_as(mixed: Tensor, images: Tensor) -> Tensor:
    """``mixed`` [B, C, H, W] in the memory format of ``images``."""
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return mixed.contiguous()
    return mixed.contiguous(memory_format=torch.channels_last)


def partners(images: Tensor, permutation: Any) -> Tensor:
    """``images[P]`` of a batch [B, …] and a permutation [B], array or tensor; ``ValueError`` if lengths differ."""
    index = as_index(permutation, images.device)
    if index.shape != images.shape[:1]:
        raise ValueError(f"permutation must be [{len(images)}] for {tuple(images.shape)}, got {tuple(index.shape)}")
    return images[index]
