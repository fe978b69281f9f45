import pytest
from torch.utils.tensorboard import SummaryWriter

from aspo_lightning import report
from aspo_lightning.errors import ConfigError


def write_run(folder, accuracy, before, after):
    with SummaryWriter(str(folder)) as writer:
        for epoch, value in enumerate(accuracy):
            writer.add_scalar("rollout/accuracy", value, 2 * epoch + 1)
            writer.add_scalar("policy/entropy", 1.0, 2 * epoch + 1)
        writer.add_scalar("eval/sums/avg@4", before, 0)
        writer.add_scalar("eval/sums/avg@4", after, 20)


def test_the_table_has_both_ends_of_the_curve_and_of_each_benchmark(tmp_path, capsys):
    write_run(tmp_path / "name" / "version_0", [0.0] * 5 + [9.0] * 3 + [0.5] * 5, 0.25, 0.75)
    report.main([str(tmp_path / "name" / "version_0"), "--figure", str(tmp_path / "f.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | accuracy, first 5 → last 5 epochs | sums/avg@4 |"
    assert lines[2] == "| name/version_0 | 0.00 → 0.50 (+0.50) | 0.25 → 0.75 (+0.50) |"
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no TensorBoard events"):
        report.read_run(tmp_path)
