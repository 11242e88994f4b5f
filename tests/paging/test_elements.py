from __future__ import annotations

import torch

from lmcache.paging.elements import stack_layers, widest_word


class TestWidestWord:
    def test_sixteen_bytes_where_everything_divides(self) -> None:
        assert widest_word([torch.zeros(4, 8, dtype=torch.bfloat16)]) == torch.complex128

    def test_a_row_that_is_too_short(self) -> None:
        assert widest_word([torch.zeros(4, 6, dtype=torch.bfloat16)]) == torch.int32
        assert widest_word([torch.zeros(4, 3, dtype=torch.bfloat16)]) == torch.int16

    def test_a_view_that_begins_in_the_midst_of_a_word(self) -> None:
        assert widest_word([torch.zeros(40, dtype=torch.bfloat16)[4:36].view(4, 8)]) == torch.int64

    def test_a_last_dim_with_gaps(self) -> None:
        assert widest_word([torch.zeros(8, 8, dtype=torch.float32).T]) == torch.int32

    def test_the_narrowest_view_decides(self) -> None:
        assert widest_word([torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)]) == torch.int32


class TestStackLayers:
    memory = torch.arange(48).view(6, 2, 4)

    def test_equal_distances(self) -> None:
        stacked = stack_layers([self.memory[0], self.memory[2], self.memory[4]])
        assert stacked is not None
        assert torch.equal(stacked, self.memory[::2])
        assert stacked.data_ptr() == self.memory.data_ptr()

    def test_layers_inside_of_blocks(self) -> None:
        stacked = stack_layers(list(self.memory.unbind(1)))
        assert stacked is not None
        assert torch.equal(stacked, self.memory.transpose(0, 1))

    def test_one_layer(self) -> None:
        stacked = stack_layers([self.memory[1]])
        assert stacked is not None
        assert torch.equal(stacked, self.memory[1:2])

    def test_nothing_to_stack(self) -> None:
        one, two, three = self.memory[0], self.memory[1], self.memory[3]
        assert stack_layers([one, two, three]) is None
        assert stack_layers([two, one]) is None
        assert stack_layers([one, one]) is None
        assert stack_layers([one, two.clone()]) is None
