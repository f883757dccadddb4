"""`optimal-sampling-serve` whose weights come from a file instead of over NCCL, which needs a GPU at both ends.

All else is real: the HTTP endpoints, vLLM's engine of weight transfer, and the way into the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from trl.generation.vllm_client import VLLMClient
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from optimal_sampling_trl.backends.vllm.plugin import TRANSFER
from optimal_sampling_trl.backends.vllm.worker.transfer import ThetaTransfer


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """Announced by TRL's client: the names, and the file that holds the tensors."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    path: str


class FileEngine(WeightTransferEngine):
    """The transport alone; `ThetaTransfer` goes before it, as it goes before vLLM's own over NCCL."""

    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: Any) -> None: ...

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM's goes on to wait for the GPU

    def receive_weights(self, update_info: FileUpdate) -> None:
        for item in load_file(update_info.path).items():  # one at a time, as a stream's portions come
            self.model.load_weights([item])

    def shutdown(self) -> None: ...

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...  # vLLM 0.26 asks for it


class ThetaFiles(ThetaTransfer, FileEngine):
    pass


class FileClient(VLLMClient):
    """TRL's client, which sends weights by a file."""

    folder: Path

    def init_communicator(self, device: Any = 0) -> None: ...

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        names, dtypes, shapes = (list(field) for field in zip(*metadata, strict=True))
        path = str(self.folder / "weights.safetensors")
        save_file({name: tensor.detach().clone() for name, tensor in named_params}, path)
        self._start_weight_update()
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes, "path": path}
        self._post(f"{self.base_url}/update_weights", json={"update_info": info})
        self._finish_weight_update()


# In each of vLLM's processes, which import this file under another name; before the plugin registers its own.
if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, ThetaFiles)

if __name__ == "__main__":
    from optimal_sampling_trl.backends.vllm.server.serve import main

    main()
