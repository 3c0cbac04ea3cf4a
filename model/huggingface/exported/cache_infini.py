"""What the Infini model carries from call to call: the memory, and the segment that is not full yet."""

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_infini import InfiniConfig


class InfiniCacheLayer(CacheLayerMixin):
    """One layer's memory and the open segment: its keys with and without positions, values, write gates and
    what else the memory's rule wants to know of a token."""

    is_croppable = False
    is_sliding = False

    def __init__(self):
        super().__init__()
        self.memory: tuple[Tensor, ...] | None = None
        self.rotated: Tensor | None = None
        self.numbers: Tensor | None = None
        self.previous: tuple[Tensor, ...] | None = None
        """With a sliding context, of the segment before: keys with positions -S to -1, values, and whether a row has
        one."""
        self.columns = 0
        """Columns of input seen, padding included."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.rotated, self.values = (x[:, :, :0] for x in (key_states, key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise ValueError("an InfiniCache is filled by the Infini model only")

    def tensors(self, change) -> None:
        """Replace every tensor x by change(x)."""
        if self.is_initialized:
            self.keys, self.rotated, self.values = change(self.keys), change(self.rotated), change(self.values)
            self.numbers = None if self.numbers is None else change(self.numbers)
            self.memory = None if self.memory is None else tuple(change(x) for x in self.memory)
            self.previous = None if self.previous is None else tuple(change(x) for x in self.previous)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__()

    def offload(self) -> None:
        raise ValueError("an InfiniCache has a fixed size and is not offloaded")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("an InfiniCache cannot go back: what is in the memory is not kept")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tensors(lambda x: x.index_select(0, indices.to(x.device)))


class InfiniCache(Cache):
    """What the model carries from call to call: of a fixed size, however much it has read.

    `copy.deepcopy` of it keeps the state after a long document for several questions.
    """

    def __init__(self, config: InfiniConfig):
        super().__init__(layers=[InfiniCacheLayer() for _ in range(config.num_hidden_layers)])
        self.fill: Tensor | None = None
        """Tokens in each row's open segment, `[b]`, on the CPU: they decide how the input is cut."""

    def reset(self) -> None:
        super().reset()
        self.fill = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.fill = None if self.fill is None else self.fill[beam_idx.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.fill = None if self.fill is None else self.fill.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.fill = None if self.fill is None else self.fill[indices.cpu()]
