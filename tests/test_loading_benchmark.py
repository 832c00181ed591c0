"""Loading keeps little more RAM than the weights take, and with an offload folder hardly any of its own."""

from benchmarks.loading import measure, write_checkpoint

PROCESS = 64 * 2**20  # what Python and PyTorch may take meanwhile


def test_peak_ram(tmp_path):
    write_checkpoint(tmp_path, "t2v-1.3B", layers=2)
    plain = measure(tmp_path)
    assert plain["kept"] > 250e6 and plain["resident"] <= 1.2 * plain["kept"] + PROCESS
    for _ in range(2):
        mapped = measure(tmp_path, tmp_path / "folder")
        assert mapped["kept"] == plain["kept"] and mapped["anonymous"] <= PROCESS
