"""Route A: the model keeps its processor, whose attention backend becomes one of ours.

diffusers' processors name the backend that is to compute their attention, a member of the
enumeration ``AttentionBackendName``; its dispatcher looks up the function of that member. Here a
layer gets a member that the enumeration does not list, whose function is :func:`attend`. The
projections, adapters, fused weights, casting and offloading stay the model's. Where the layer is
not to be changed, the function calls the backend that was there before.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from vstar_kernels.models.full3d.context_parallel import attend_spread, is_spread
from vstar_kernels.models.full3d.seats import Seat, attend

ATTRIBUTE = "_attention_backend"  # of processors
_ABSENT: Any = object()
_ARGUMENTS = {
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    "_parallel_config",
}  # fmt: skip
_LOCK = threading.RLock()


class Member:
    """A member of ``AttentionBackendName`` whose function is a seat's.

    What diffusers knows of it stays registered, as other threads may be on their way to it; hence
    members that nobody uses any more are used again.

    Attributes:
        name: The member.
        previous: The backend that it took the place of; None is diffusers' active one.
    """

    _unused: ClassVar[list[Member]] = []
    _count: ClassVar[int] = 0

    def __init__(self) -> None:
        registry = _registry()
        from diffusers.models.attention_dispatch import AttentionBackendName

        self._seat: ref[Seat] | None = None
        self.previous: Any = None
        value = f"vstar_kernels_{Member._count}"
        Member._count += 1
        name: Any = str.__new__(AttentionBackendName, value)
        name._name_, name._value_ = value.upper(), value
        # What is pickled or copied in depth with a processor is the backend that was there before.
        name.__deepcopy__ = lambda memo: self.previous
        name.__reduce_ex__ = self._reduce
        registry._constraints[name] = []
        registry._supported_arg_names[name] = _ARGUMENTS
        registry._supports_context_parallel.add(value)
        registry._backends[name] = self.attend
        self.name = name

    @classmethod
    def of(cls, seat: Seat, previous: Any) -> Member:
        """Returns a member for a layer, or one that it shares with others."""
        with _LOCK:
            if seat.common is None:
                return cls._take(seat, previous)
            shared = _SHARED.setdefault(seat.common, {})
            if previous not in shared:
                shared[previous] = cls._take(seat.common, previous)
            return shared[previous]

    @classmethod
    def _take(cls, seat: Seat, previous: Any) -> Member:
        member = cls._unused.pop() if cls._unused else cls()
        # diffusers' registry keeps the member for ever, and must not keep the model.
        member.previous, member._seat = previous, ref(seat)
        return member

    @property
    def seat(self) -> Seat | None:
        """The layer; None where it only passes calls on."""
        return None if self._seat is None else self._seat()

    def retire(self) -> None:
        """Has it pass calls on, until it is taken again."""
        with _LOCK:
            if self._seat is not None:
                self._seat = None
                Member._unused.append(self)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """Is what diffusers' dispatcher calls; all tensors are (batch, tokens, heads, head_dim)."""

        def stock() -> Tensor:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            out: Tensor = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                backend=self.previous,
                parallel_config=_parallel_config,
            )
            return out

        seat = self.seat
        if seat is None or is_causal:  # what is causal is text (Cosmos 3)
            return stock()
        masked = attn_mask is not None
        if is_spread(_parallel_config):
            if not seat.is_taken():
                return stock()
            return attend_spread(
                seat,
                query,
                key,
                value,
                scale=scale,
                masked=masked,
                parallel_config=_parallel_config,
            )
        return attend(seat, query, key, value, scale=scale, masked=masked, stock=stock)

    def _reduce(self, protocol: Any) -> Any:
        if self.previous is None:
            return type(None), ()
        return self.previous.__reduce_ex__(protocol)


_SHARED: WeakKeyDictionary[Seat, dict[Any, Member]] = WeakKeyDictionary()


def retire_shared(common: Seat) -> None:
    """Retires the members that layers have shared."""
    with _LOCK:
        for member in _SHARED.pop(common, {}).values():
            member.retire()


class MemberRoute:
    """Route A of one layer; see the file.

    Args:
        seat: The layer's.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        # All processors that were ever given a member, which a model may put back later (after
        # unfusing its projections), and what they had before.
        self._given: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._member: Member | None = None

    def is_in(self) -> bool:
        """Returns whether the layer's processor names the member."""
        member = self._member
        if member is None or member.seat is not (self._seat.common or self._seat):
            return False
        return _backend(self._seat.layer.module.processor) is member.name

    def put_in(self) -> None:
        """Has the layer's processor name a member, and notes what it named before."""
        processor = self._seat.layer.module.processor
        _registry()  # an older diffusers' processors do not go there either, and are not to blame
        if not hasattr(processor, ATTRIBUTE):
            raise ValueError(
                f"{self._seat.layer.name} has a {type(processor).__name__}, which does not go "
                "through diffusers' attention backends: frame_attention cannot be put in there"
            )
        self.take_out()
        found = vars(processor).get(ATTRIBUTE, _ABSENT)
        self._refuse_shared(processor)
        self._member = Member.of(self._seat, _backend(processor))
        self._given[processor] = found
        setattr(processor, ATTRIBUTE, self._member.name)

    def _refuse_shared(self, processor: Any) -> None:
        """Raises ValueError where another layer that is controlled has the same processor."""
        function = _registry()._backends.get(_backend(processor))
        member = getattr(function, "__self__", None)
        if isinstance(member, Member) and member.seat not in (None, self._seat, self._seat.common):
            raise ValueError(
                f"{self._seat.layer.name} has the same processor object as "
                f"{member.seat.layer.name}: give each layer one of its own"
            )

    def take_out(self) -> None:
        """Gives the processors back what they named, where they still name the member."""
        member = self._member
        if member is None:
            return
        for processor, found in list(self._given.items()):
            if _backend(processor) is member.name:
                if found is _ABSENT:
                    vars(processor).pop(ATTRIBUTE, None)
                else:
                    setattr(processor, ATTRIBUTE, found)
        if self._seat.common is None or member.seat is self._seat:
            member.retire()
        self._member = None


def _backend(processor: Any) -> Any:
    return getattr(processor, ATTRIBUTE, None)


def _registry() -> Any:
    """Returns diffusers' backends; raises ImportError where they are not those that are known."""
    import diffusers
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    if not hasattr(registry, "_supports_context_parallel"):
        raise ImportError(
            f"diffusers is {diffusers.__version__}, whose attention backends are not known here: "
            "rules for full-3D models need 0.37 or later"
        )
    return registry
