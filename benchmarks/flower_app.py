"""(c) The digits federation as a Flower simulation, and the same by `anyrank`, each from process start to process end.

    python flower_app.py flower|anyrank ROUNDS [FOLDER]

Flower's part is a server loop and a client function in its message API; the server's method and its choice of clients are
anyrank's, and a client trains as baseline (a) does. A client's base model and data are loaded once in each of Ray's workers.
"""

from __future__ import annotations

import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1",
}  # fmt: skip

import functools
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent / "src")])  # for Ray's workers


def by_anyrank(rounds: int, folder: Path) -> float:
    """The engine itself, run folder included; the last round's mean training loss."""
    import simulation as benchmark

    from anyrank import simulation

    simulation.execute(benchmark.configuration(benchmark.SIZES[0], rounds, None), folder)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]


@functools.cache
def world(rounds: int):
    """The federation, and the engine that trains its clients; loaded once in a process."""
    import simulation as benchmark
    import torch

    from anyrank import simulation

    torch.set_num_threads(1)
    built = simulation.build(benchmark.configuration(benchmark.SIZES[0], rounds, None))
    return built, benchmark._baseline(benchmark.LOOP, built)


def by_flower(rounds: int) -> float:
    """The same clients on Flower's virtual clients: each message says whose turn it is and carries that client's download."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    client_app, server_app, reached = ClientApp(), ServerApp(), {}

    @client_app.train()
    def train(message, context):
        from anyrank.messages.plan import plan_round

        built, engine = world(rounds)
        name, round = message.content["task"]["client"], message.content["task"]["round"]
        index = built.population.index(name)
        client = built.population.client(index)
        job = _job(built, index, client, _unpack(built, client, message.content["adapter"].to_torch_state_dict()))
        plan = plan_round(built.config.train, round, rounds, built.config.run.seed)
        (update,) = engine.train([job], plan)
        content = RecordDict({
            "adapter": ArrayRecord(torch_state_dict=_pack(update.adapter)),
            "told": ConfigRecord({"client": name, "loss": update.metrics["loss"]}),
        })  # fmt: skip
        return Message(content=content, reply_to=message)

    @server_app.main()
    def serve(grid, context):
        from anyrank.federation import asking
        from anyrank.messages.records import ClientUpdate

        built, engine = world(rounds)
        state = built.method.init(engine.start(), _scaling(built), built.config.run.seed)
        while len(nodes := sorted(grid.get_node_ids())) < len(built.population):
            pass
        for round in range(1, rounds + 1):
            jobs, _ = asking.dispatch(built, state, round)
            messages = [
                Message(
                    content=RecordDict({
                        "adapter": ArrayRecord(torch_state_dict=_pack(job.download.adapter)),
                        "task": ConfigRecord({"client": job.client.name, "round": round}),
                    }),
                    dst_node_id=node, message_type="train", group_id=str(round),
                )
                for job, node in zip(jobs, nodes, strict=False)
            ]  # fmt: skip
            by_index, updates = {job.client.name: job for job in jobs}, []
            for reply in grid.send_and_receive(messages):
                job = by_index[reply.content["told"]["client"]]
                adapter = _unpack(built, job.client, reply.content["adapter"].to_torch_state_dict())
                loss = reply.content["told"]["loss"]
                updates.append(ClientUpdate(adapter, job.num_examples, job.client.name, {"loss": loss}))
            state = built.method.aggregate(state, updates)
        reached["loss"] = sum(update.metrics["loss"] for update in updates) / len(updates)

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app=server_app, client_app=client_app, num_supernodes=20, backend_config=backend)
    return reached["loss"]


def _scaling(built):
    from anyrank.messages.records import Scaling

    return Scaling(built.config.lora.alpha, built.config.lora.scaling)


def _pack(adapter) -> dict:
    return {f"{name}/{f}": getattr(layer, f) for name, layer in adapter.layers.items() for f in "AB"}


def _unpack(built, client, tensors):
    from anyrank.adapter.adapter import Adapter
    from anyrank.adapter.layer import LoraLayer

    names = sorted({key.rpartition("/")[0] for key in tensors})
    scaling = _scaling(built)
    return Adapter(
        {name: LoraLayer(tensors[f"{name}/A"], tensors[f"{name}/B"], scaling.of(name, client.rank)) for name in names}
    )


def _job(built, index, client, adapter):
    from anyrank.messages.records import Download, Job

    return Job(client, int(built.population.sizes[index]), lambda: Download(adapter, {}))


def main() -> None:
    rounds = int(sys.argv[2])
    reached = by_anyrank(rounds, Path(sys.argv[3])) if sys.argv[1] == "anyrank" else by_flower(rounds)
    print(json.dumps({"loss": reached}))


if __name__ == "__main__":
    import flower_app  # under its own name, by which Ray's workers find its functions

    flower_app.main()
