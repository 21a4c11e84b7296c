"""A process that is forked while another thread infers."""

from __future__ import annotations

import os
import threading
import time

import torch

from models import adapt, llama, tokens


def test_a_forked_process_runs_the_model_while_another_thread_infers():
    """The child waited for ever for a lock that the other thread had."""
    model = adapt(llama())
    ids, stop = tokens(), threading.Event()

    def infer():
        with torch.no_grad():
            while not stop.is_set():
                model(input_ids=ids)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for number in range(15):
            time.sleep(0.003 * (number % 7))
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    model(input_ids=ids)
                os._exit(0)
            end = time.monotonic() + 60
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                if time.monotonic() > end:
                    os.kill(child, 9)
                time.sleep(0.01)
            assert ended[1] == 0
    finally:
        stop.set()
        thread.join()
