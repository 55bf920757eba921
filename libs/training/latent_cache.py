"""A disk cache of what the frozen VAE makes of whole frames.

The centre's crop of a frame is the same in every epoch, so it need not be encoded again; masked frames differ each time
and are never kept. Loader workers read the cache, the trainer adds what was missing.
"""

import hashlib
import os
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from libs.training.log import log

MAX_WAITING = 64  # batches whose frames wait for a slow disk; further ones are not kept
CHECKSUM_BYTES = 4
PARTIAL = re.compile(r"[0-9a-f]{32}\.[0-9]+")  # a key, and the process that writes it
ABANDONED = 3600  # seconds after which nobody writes a half-written file any more
SUBFOLDER = re.compile(r"[0-9a-f]{2}")  # the first letters of its files' names


class LatentCache:
    """Posteriors, (2c, h, w) per frame: c means, then c log-variances.

    One file per frame, whole or not there, for any number of processes at a time. Its name follows from the frame's
    path, size and time, the resolution of the crop, the VAE and its precision: what has changed is encoded anew.
    """

    def __init__(self, folder, vae, shape, dtype, limit_gb=16.0, num_processes=1):
        """
        Args:
            vae: fingerprint of the VAE's weights.
            shape: (2c, h, w) of the posteriors.
            dtype: their type, the VAE's own.
            limit_gb: size of all files above which nothing is added; every one of `num_processes` adds its share of
                what is left at most.
        """
        self.folder, self.shape, self.dtype = Path(folder), tuple(shape), dtype
        self.meaning = f"{vae} {self.shape} {dtype}"  # the shape tells that of the crop, which is the centre's
        self.bytes_per_frame = torch.Size(shape).numel() * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        self.room = max(0, limit_gb * 1e9 - self.measure()) / num_processes  # bytes
        self.writer, self.stream, self.said = None, None, False
        self.places = threading.BoundedSemaphore(MAX_WAITING)

    def measure(self):
        """Bytes held, of any resolution, VAE and precision. What killed runs have left half-written is deleted."""
        total = 0
        for subfolder in (path for path in self.folder.iterdir() if SUBFOLDER.fullmatch(path.name) and path.is_dir()):
            with os.scandir(subfolder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError, PermissionError):  # another run's, which has renamed it or owns it
                        stat = entry.stat()
                        if PARTIAL.fullmatch(entry.name) and stat.st_mtime < time.time() - ABANDONED:
                            os.unlink(entry)
                        else:
                            total += stat.st_size
        return total

    def key(self, path):
        stat = os.stat(path)
        identity = f"{self.meaning} {os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"
        return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]

    def file(self, key):
        return self.folder / key[:2] / key

    def read(self, paths):
        """(posteriors (f, 2c, h, w), [None or, where a frame is not held, its key])."""
        posteriors, missing = torch.zeros((len(paths), *self.shape), dtype=self.dtype), []
        for i, path in enumerate(paths):
            key = self.key(path)
            content = self.load(self.file(key))
            if content is not None:
                posteriors[i] = torch.frombuffer(content, dtype=self.dtype).view(self.shape)
            missing.append(key if content is None else None)
        return posteriors, missing

    def load(self, file):
        """A file's posteriors as bytes; None where it is missing, or not what was written (the machine crashed)."""
        try:
            content = bytearray(file.read_bytes())
        except OSError:
            return None
        checksum = content[self.bytes_per_frame :]
        del content[self.bytes_per_frame :]
        return content if checksum == zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") else None

    def add(self, keys, posteriors):
        """Keep `posteriors` (n, 2c, h, w) under n keys, in the background: neither GPU nor disk are waited for."""
        size = len(keys) * (self.bytes_per_frame + CHECKSUM_BYTES)
        if self.room < size:
            self.say_once(f"{self.folder} has reached --latent_cache_gb: frames without a place are encoded every time")
            return
        if not self.places.acquire(blocking=False):
            return
        self.room -= size
        host, copied = self.copy_to_host(posteriors) if posteriors.is_cuda else (posteriors.clone(), None)
        self.writer = self.writer or ThreadPoolExecutor(1)
        self.writer.submit(self.write, keys, host, copied)

    def copy_to_host(self, posteriors):
        """(the posteriors in pinned memory, an event after which they are there). On the cache's own stream: pinned
        memory must not be freed, as the writer does, while a CUDA graph is captured on its stream."""
        self.stream = self.stream or torch.cuda.Stream()
        host = torch.empty(posteriors.shape, dtype=posteriors.dtype, pin_memory=True)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            host.copy_(posteriors, non_blocking=True)
        current.wait_stream(self.stream)  # until then the posteriors' memory is not free
        return host, self.stream.record_event()

    def write(self, keys, posteriors, copied):
        if copied:
            copied.synchronize()
        partial = None
        try:
            for key, content in zip(keys, posteriors, strict=True):
                content = content.contiguous().view(torch.uint8).numpy().tobytes()
                file = self.file(key)
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f"{key}.{os.getpid()}")
                partial.write_bytes(content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big"))
                partial.replace(file)
        except OSError as error:
            self.room = 0
            self.say_once(f"{self.folder} cannot be written ({error.strerror}), nothing more is added")
            if partial:  # a full disk needs the space
                partial.unlink(missing_ok=True)
        finally:
            self.places.release()

    def say_once(self, line):
        """Log, the first time only, why nothing is added any more."""
        if not self.said:
            self.said = True
            log.info("latent cache: %s", line)

    def close(self):
        """Wait for what is being written."""
        if self.writer:
            self.writer.shutdown()
            self.writer = None
