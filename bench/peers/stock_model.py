"""The run's network and head as one eager PyTorch module; its output are logits."""

import os
from pathlib import Path

import torch


class StockModel(torch.nn.Module):
    """The feature extractor and the linear head of a run."""

    def __init__(self) -> None:
        super().__init__()
        from cxr_training.heads.fitted import CalibratedHead, LinearHead  # noqa: PLC0415
        from cxr_training.runs import load_run  # noqa: PLC0415

        run = load_run(Path(os.environ["CXR_BENCH_RUN"]))
        head, temperature = run.head, 1.0
        if isinstance(head, CalibratedHead):
            head, temperature = head.head, head.temperature
        if not isinstance(head, LinearHead):
            raise SystemExit("The stock handler is compared on runs with a linear head.")
        self.backbone = run.backbone().module
        self.head = torch.nn.Linear(head.weight.shape[1], head.weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(torch.as_tensor(head.weight / temperature))
            self.head.bias.copy_(torch.as_tensor(head.bias / temperature))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[N, classes]` of images `[N, 3, height, width]`."""
        logits: torch.Tensor = self.head(self.backbone(images))
        return logits
