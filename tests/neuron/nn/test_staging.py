"""Memory for weights on their way: who has it, what is kept, what goes back."""

import pytest
import torch

from cortex.neuron.nn.staging import Staging


def test_what_one_matrix_was_staged_in_is_there_for_the_next_smaller_one() -> None:
    staging = Staging()
    with staging.take(4, 6) as first:
        first.fill_(1)
    with staging.take(3, 5, dtype=torch.int8) as second:
        assert second.shape == (3, 5)
        assert second.dtype == torch.int8
        assert second.data_ptr() == first.data_ptr()
        assert second.is_contiguous()


def test_two_at_a_time_have_memory_of_their_own() -> None:
    staging = Staging()
    with staging.take(8) as first, staging.take(8) as second:
        first.fill_(1)
        second.fill_(2)
        assert first.eq(1).all()
    with staging.take(8) as kept, staging.take(8) as new:
        assert kept.data_ptr() != new.data_ptr()


def test_of_several_pieces_the_largest_is_kept() -> None:
    staging = Staging()
    with staging.take(64) as large, staging.take(8):
        pass
    with staging.take(64) as again:
        assert again.data_ptr() == large.data_ptr()


def test_a_failure_gives_its_memory_back_and_a_release_frees_it() -> None:
    staging = Staging()
    with pytest.raises(ValueError, match="unreadable"), staging.take(8):
        raise ValueError("unreadable")
    assert staging.kept_bytes == 32
    staging.release()
    assert staging.kept_bytes == 0
