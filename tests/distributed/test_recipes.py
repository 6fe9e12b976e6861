# SPDX-License-Identifier: Apache-2.0
"""What docs/distributed.md says in files of other programs: accelerate and DeepSpeed read it so."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.distributed.recipes import AT_LOAD, OF, blocks, deepspeed_config, python


@pytest.mark.parametrize("text", blocks("yaml"))
def test_accelerate_reads_the_config(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    read = load_config_from_file(str(tmp_path / "config.yaml"))
    said = yaml.safe_load(text)
    assert read.num_processes == said["num_processes"] and read.distributed_type == said["distributed_type"]
    assert read.fsdp_config == said.get("fsdp_config", {})


def test_accelerate_knows_the_options_of_fsdp(monkeypatch):
    """As `accelerate launch` hands them on, in the environment."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    (said,) = [found for found in map(yaml.safe_load, blocks("yaml")) if "fsdp_config" in found]
    for name, value in said["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL" in str(plugin.state_dict_type) and "transformer" in str(plugin.auto_wrap_policy)


def test_every_recipe_is_followed_by_some_check():
    named = {text.splitlines()[0].removeprefix("# ") for text in blocks("python")}
    assert named == {"setup", *AT_LOAD, *(name for names in OF.values() for name in names)}
    assert all(python(name) for name in named) and deepspeed_config(2)["zero_optimization"] == {"stage": 2}
