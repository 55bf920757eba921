"""A training step: loss, gradients, clipping, optimizer. On one GPU the first two are replayed as one CUDA graph."""

from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from common.distributed import unsharded
from common.errors import InputError, first_line
from libs.training.loss import EncodedBatch, denoising_loss, encode_batch

WARM_UP = 3  # passes before a capture: what is compiled, chosen or allocated once is so in them


@dataclass(eq=False)
class Captured:
    """A forward and backward pass on fixed places in memory. The pool must outlive the graph, so it comes last."""

    graph: torch.cuda.CUDAGraph
    inputs: EncodedBatch
    loss: torch.Tensor
    pool: torch.cuda.MemPool


class TrainingStep:
    """Called with every batch, where `accelerator.accumulate` encloses it.

    Args:
        accelerator, model, optimizer: as prepared.
        base: LoadedBase.
        max_grad_norm: gradients are clipped to it.
        cuda_graph: capture the passes as a CUDA graph (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), so
            that the host starts thousands of kernels as one. For one process on a GPU.
    """

    def __init__(self, accelerator, model, optimizer, base, max_grad_norm, cuda_graph=False):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.base, self.max_grad_norm = base, max_grad_norm
        # Gradients keep their places where several passes add to them: DDP's buckets, or the graph's own.
        in_place = cuda_graph or isinstance(model, DistributedDataParallel)
        self.accumulates = in_place and accelerator.gradient_accumulation_steps > 1
        self.stream = torch.cuda.Stream() if cuda_graph else None  # the default one cannot be captured
        self.captured, self.passes = None, 0

    def __call__(self, batch):
        """(loss, the gradients' norm before clipping, or None where they are not complete yet), on the device."""
        loss = self.on_stream(batch) if self.stream else self.loss_and_gradients(encode_batch(self.base, batch))
        grad_norm = None
        if self.accelerator.sync_gradients:
            grad_norm = unsharded(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        self.optimizer.step()
        self.clear_gradients()
        return loss, grad_norm

    def loss_and_gradients(self, encoded):
        loss = denoising_loss(self.model, self.base.noise_scheduler, encoded)
        self.accelerator.backward(loss)
        return loss.detach()

    def clear_gradients(self):
        # Those of a graph stay where they are, as the next replay writes them anew.
        if self.accumulates or not self.captured:
            self.optimizer.zero_grad(set_to_none=not self.accumulates)

    def on_stream(self, batch):
        """The loss and gradients of a batch: the first few passes as they are, then as replays."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self.passes += 1
            warm = self.passes > WARM_UP
            loss = self.replay(batch) if warm else self.loss_and_gradients(encode_batch(self.base, batch))
        main.wait_stream(self.stream)
        return loss.clone()

    def replay(self, batch):
        if not self.captured:
            self.captured = self.capture(encode_batch(self.base, batch))
        else:
            # In the graph's memory, which nothing uses between two replays: the VAE takes some GiB.
            with torch.cuda.use_mem_pool(self.captured.pool):
                new = encode_batch(self.base, batch)
                for name, place in vars(self.captured.inputs).items():
                    place.copy_(getattr(new, name))
        self.captured.graph.replay()
        return self.captured.loss

    def capture(self, inputs):
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
        try:
            # thread_local: loading goes on meanwhile, in threads that call CUDA.
            with torch.cuda.graph(graph, pool.id, self.stream, capture_error_mode="thread_local"):
                loss = self.loss_and_gradients(inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # what went wrong inside, before the capture could not end
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise InputError(f"no CUDA graph could be made ({first_line(cause)}): CUDA_GRAPH=0 goes without") from error
        return Captured(graph, inputs, loss, pool)

    def release(self):
        """Give the graph's memory back, to validate or save: the pass after the next one captures another."""
        self.passes = min(self.passes, WARM_UP - 1)
        if self.captured:
            self.captured = None
            self.clear_gradients()
            torch.cuda.empty_cache()
