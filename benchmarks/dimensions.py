"""What it costs to cut vectors to fewer dimensions and normalize them again, as ``gircse-serve --allow-dimensions``.

    python benchmarks/dimensions.py gircse-demo-8 512,384,256,128,64 --sts FILE.tsv --classification FILE.tsv

Every text is embedded once, at K. The intervals, 95 %, are of the difference to whole vectors, over resamples of the
pairs or texts; the overlap is of each text's ten nearest neighbors with those by whole vectors.
"""

import argparse
from pathlib import Path

import numpy as np

from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import tokenize_prompts
from gircse.evaluation.tasks.scoring import Task
from gircse.reporting.similarity import neighbor_overlap
from gircse.runtime import Embedder
from gircse.runtime.numerics import Float32, l2_normalize


def main() -> None:
    """Print one line for each task and number of dimensions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("dimensions", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--classification", type=Path)
    parser.add_argument("--precision")
    args = parser.parse_args()
    with Embedder(args.bundle, precision=args.precision) as embedder:
        for task in read_tasks(TaskOptions(sts=args.sts, classification=args.classification)):
            print_costs(task, embed(embedder, task), args.dimensions)


def embed(embedder: Embedder, task: Task) -> Float32:
    """Return (n, hidden) float32 unit vectors of the task's prompts."""
    vectors = np.empty((len(task.prompts), embedder.embedding_dimension), np.float32)
    for rows, outputs in embedder.run_batches(tokenize_prompts(embedder.tokenizer, task.prompts)):
        vectors[list(rows)] = outputs.step_embeddings[:, -1]
    return vectors


def print_costs(task: Task, whole: Float32, dimensions: list[int]) -> None:
    """Print what is left of a task's score with fewer dimensions."""
    print(f"{task.name}, {len(whole)} texts, {whole.shape[1]} dimensions: {task.metric} {task.score(whole):.4f}")
    for count in dimensions:
        cut = l2_normalize(whole[:, :count])
        low, high = task.difference_interval(cut, whole)
        overlap = neighbor_overlap(cut, whole)
        print(f"  {count}: {task.score(cut):.4f} ({low:+.4f} to {high:+.4f}), top-10 overlap {overlap:.3f}", flush=True)


if __name__ == "__main__":
    main()
