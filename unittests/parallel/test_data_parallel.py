"""paddle.DataParallel over two processes of the CPU against one."""

import data_parallel
import numpy as np
import pytest
from processes import run_script


@pytest.mark.slow
def test_data_parallel(tmp_path):
    """Two processes with half of each batch train as one process with all of it."""
    path = tmp_path / "parameters.npz"
    result = run_script(data_parallel.__file__, path, threads=1, directory=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    network = data_parallel.make_network()
    start = {name: p.numpy() for name, p in network.named_parameters()}
    data_parallel.train(network, data_parallel.make_batches())
    found = np.load(path)
    for name, p in network.named_parameters():
        np.testing.assert_allclose(found[name], p.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.array_equal(found[name], start[name]), name
