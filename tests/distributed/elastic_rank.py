"""`infini`, as launch/torchrun.sh starts it (MODULE), in steps that take their time and tell what they have read."""

import os
import sys
import time

from launch.cli import main
from launch.processes.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    from pipeline.training.trainer import Trainer

    record = Trainer.record

    def record_slowly(trainer, batch, *arguments):
        time.sleep(float(os.environ["STEP_S"]))
        record(trainer, batch, *arguments)
        with open(os.environ["BATCHES"], "a") as out:
            for lane, digest in zip(batch.lane_ids.tolist(), batch.digests, strict=True):
                out.write(f"{trainer.progress.step} {lane} {digest}\n")

    Trainer.record = record_slowly
    sys.exit(main())
