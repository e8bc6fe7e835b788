"""What `test_parallel` has two processes do."""

import os
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mdm_models.data.stream import Batch
from mdm_models.processes import Processes, init_process_group
from mdm_models.training.config import changed
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.learner import Learner
from tests.training.models import LEAST_NESTED_MODEL, clips, settings

STEPS, CHUNKS = 3, 4  # a step has four chunks of two samples


def chunk(number: int) -> Batch:
    """The chunk of this number, the same whoever asks."""
    every = clips(2 * CHUNKS, frames=1)
    part = slice(2 * number, 2 * number + 2)
    return Batch(every.images[part], every.captions[part], [])


def learn(processes: Processes, folder: Path, parallel: str, precision: str = "float32") -> dict:
    """Some steps, and what they led to: whole tensors, whatever the number of processes."""
    config = changed(
        settings(folder / "none.tar", folder / "run"), parallel=parallel, frames=1, lr=1e-3, batch_size=2 * CHUNKS
    )
    config = changed(config, precision=precision, checkpoint_activations=parallel == "fsdp", level_shares=(0.5, 1.0))
    learner = Learner(config, LEAST_NESTED_MODEL, open_encoder(config.model, 0, processes.device), processes)
    dtypes = set()
    learner.model.unet.conv_out.register_forward_hook(lambda module, *_: dtypes.add(module.weight.dtype))
    mine = [chunk(number) for number in range(processes.rank, CHUNKS, processes.world_size)]
    outcomes = [learner.learn(mine) for _ in range(STEPS)]
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gradients = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in learner.model.named_parameters()
    }
    with learner.as_pipeline() as pipeline:
        sampled = pipeline("a cat", num_inference_steps=2, seed=0, output_type="pt", progress=False)
    learner.export(folder / f"{parallel}-{precision}-model")
    return {
        "losses": torch.tensor([[o.loss, o.grad_norm, *o.level_losses] for o in outcomes], dtype=torch.float64),
        "gradients": gradients,
        "weights": get_model_state_dict(learner.model, options=whole),
        "sampled": sampled,
        "computed in": sorted(map(str, dtypes)),
        "local": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in learner.model.parameters()),
    }


def main(folder: Path, environment: dict[str, str]) -> None:
    """Be one of the processes, as torchrun starts it with such an environment."""
    os.environ |= environment
    torch.set_num_threads(1)
    with init_process_group("cpu") as processes:
        for parallel, precision in (("ddp", "float32"), ("fsdp", "float32"), ("fsdp", "bf16")):
            found = learn(processes, folder, parallel, precision)
            if processes.is_main:
                torch.save(found, folder / f"{parallel}-{precision}.pt")
    os._exit(0)  # gloo's threads sometimes abort a process that used FSDP2 as it ends
