"""Forward and backward pass replayed as one CUDA graph: the host starts thousands of kernels as one.

https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError, first_line
from libs.training.loss import EncodedBatch, ForwardBackward, denoising_loss, encode_batch

WARM_UP = 3  # passes before a capture: compilation, cuDNN's choice of kernels and lazy allocation happen there
WARM_UP_DDP = 11  # DDP times its first ten passes, which cannot be captured


def leave_default_stream():
    """It cannot be captured, nor may anything that a captured pass waits for have begun there, such as DDP's hooks."""
    torch.cuda.set_stream(torch.cuda.Stream())


@dataclass(eq=False)
class Captured:
    """A forward and backward pass on fixed places in memory. The pool must outlive the graph, so it comes last."""

    graph: torch.cuda.CUDAGraph
    encoded: EncodedBatch
    loss: torch.Tensor
    pool: torch.cuda.MemPool


class GraphedForwardBackward(ForwardBackward):
    """The first passes run as they are, one is captured, then it is replayed, DDP's exchange of gradients included.

    Needs a GPU, and a stream other than the default one: see `leave_default_stream`.
    """

    keeps_gradients = True

    def __init__(self, accelerator, model, base, weights=None):
        super().__init__(accelerator, model, base, weights)
        self.captured, self.passes, self.optimizer = None, 0, None
        self.warm_up = WARM_UP
        if isinstance(model, DistributedDataParallel):
            self.warm_up = WARM_UP_DDP
            model._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # no pass is timed later on

    def __call__(self, batch):
        self.passes += 1
        loss = self.replay(batch) if self.passes > self.warm_up else super().__call__(batch)
        return loss.clone()

    def replay(self, batch):
        if not self.captured:
            self.captured = self.capture(encode_batch(self.base, batch, self.weights))
        else:
            # In the graph's memory, which nothing uses between two replays: the VAE takes some GiB.
            with torch.cuda.use_mem_pool(self.captured.pool):
                encoded = encode_batch(self.base, batch, self.weights)
                for name, place in vars(self.captured.encoded).items():
                    if place is not None:
                        place.copy_(getattr(encoded, name))
        self.captured.graph.replay()
        return self.captured.loss

    def backward(self, encoded):
        loss = denoising_loss(self.model, self.base.noise_scheduler, encoded)
        self.accelerator.backward(loss)
        return loss.detach()

    def capture(self, encoded):
        """The Captured of an EncodedBatch, whose memory is the graph's input from now on; nothing is computed yet."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
        try:
            # thread_local: loading goes on meanwhile, in threads that call CUDA.
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool.id, stream, capture_error_mode="thread_local"):
                loss = self.backward(encoded)
        except RuntimeError as error:
            cause = error.__context__ or error  # what went wrong inside, before the capture could not end
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise InputError(f"no CUDA graph could be made ({first_line(cause)}): CUDA_GRAPH=0 goes without") from error
        return Captured(graph, encoded, loss, pool)

    def clear_gradients(self, optimizer):
        self.optimizer = optimizer
        # A graph's gradients stay where they are, as the next replay writes them anew.
        if self.accumulates_in_place or not self.captured:
            super().clear_gradients(optimizer)

    def release(self):
        """Give the graph's memory back: the pass after the next one captures another."""
        self.passes = min(self.passes, self.warm_up - 1)
        if self.captured:
            self.captured = None
            super().clear_gradients(self.optimizer)
            torch.cuda.empty_cache()
