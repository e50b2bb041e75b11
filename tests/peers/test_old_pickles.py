"""The reader of PyTorch's old pickles in the examples, against PyTorch."""

import efficientnet
import fetch
import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.skipif(
    not fetch.has(fetch.EFFICIENTNET_PTH), reason="the weights are not in the cache"
)
def test_tensors_are_those_that_torch_loads():
    path = fetch.efficientnet()
    found, want = efficientnet.read_pickle(path), torch.load(path, weights_only=True)
    assert list(found) == list(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
        assert found[name].dtype == tensor.numpy().dtype


def test_tensors_that_share_a_storage_or_are_transposed(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"whole": whole, "part": whole[1:3, 2:], "turned": whole.T, "count": torch.tensor(7)}
    path = tmp_path / "weights.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    found = efficientnet.read_pickle(path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
