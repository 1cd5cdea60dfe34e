"""A weight transport of one's own: each bucket travels as a safetensors file.

Run a night with it, from the root of the repository:

    sleeprl night resources.transport=examples.my_transport.SafetensorsTransport
"""

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from sleeprl.weight_sync.base import WeightTransport, split_tensors


class SafetensorsTransport(WeightTransport):
    """Reaches every engine on the trainer's host, vLLM's or another."""

    same_host = True

    def __init__(self, config):
        self._directory = Path()

    def begin(self, version):
        self._directory = Path(tempfile.mkdtemp(prefix="sleeprl-weights-"))

    def buckets(self, tensors):
        for number, group in enumerate(split_tensors(tensors, 64 << 20)):
            path = self._directory / f"{number}.safetensors"
            save_file({name: tensor.detach().cpu().clone() for name, tensor in group}, path)
            yield {"path": str(path)}  # the engines load it, while the next one is written

    @staticmethod
    def receive(bucket):
        return load_file(bucket["path"]).items()

    def finish(self):
        shutil.rmtree(self._directory)
