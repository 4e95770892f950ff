import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import f1_score

import anyrank

x, y = load_breast_cancer(return_X_y=True)
x, held_out = ((x - x.mean(0)) / x.std(0)).astype("float32"), np.arange(len(x)) % 4 == 0
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(30, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
train, test = anyrank.Examples(x[~held_out], y[~held_out]), anyrank.Examples(x[held_out], y[held_out])
task = anyrank.Task(module=net, targets=("0", "2"), train=train, test=test, metrics={"f1": f1_score})
rows = np.arange(len(train))
shards = {"north": rows[:300], "south": rows[300:]}
federation = anyrank.Federation(task, ranks={"north": 2, "south": 1}, shards=shards, method="raflora", rounds=10)
result = federation.run("runs/hospitals")
print(result.summary["start_accuracy"], result.summary["accuracy"], result.metrics[-1]["f1"])
result.share(1).save("for-south")
