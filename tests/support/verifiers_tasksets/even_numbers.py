"""A taskset of Prime's ``verifiers`` for the tests: the share of even numbers in the reply."""

import verifiers.v1 as vf

__all__ = ["EvenTaskset"]


class EvenTask(vf.Task[vf.TaskData]):
    @vf.reward(weight=1.0)
    async def even(self, trace: vf.Trace) -> float:
        words = (trace.last_reply or "").split()
        return sum(word.isdigit() and int(word) % 2 == 0 for word in words) / max(1, len(words))


class EvenConfig(vf.TasksetConfig):
    num_tasks: int = 100


class EvenTaskset(vf.Taskset[EvenTask, EvenConfig]):
    def load(self) -> list[EvenTask]:
        return [
            EvenTask(vf.TaskData(prompt=f"{i % 9 + 1} {3 * i % 7 + 1}"), self.config.task)
            for i in range(self.config.num_tasks)
        ]
