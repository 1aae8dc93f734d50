"""The two games against their rules, written down once more with plain numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.environments import make


class PlainBreakout:
    """MinAtar's Breakout as its authors wrote it: one case after the other."""

    def __init__(self, right: bool):
        self.y, self.x, self.direction = 3, 9 if right else 0, 3 if right else 2
        self.last = self.y, self.x
        self.paddle, self.strike = 4, False
        self.bricks = np.zeros((10, 10), int)
        self.bricks[1:4] = 1

    def act(self, action: int) -> tuple[int, bool]:
        reward, end = 0, False
        self.paddle = {0: self.paddle, 1: max(0, self.paddle - 1), 2: min(9, self.paddle + 1)}[action]
        self.last = self.y, self.x
        y, x = {0: (-1, -1), 1: (-1, 1), 2: (1, 1), 3: (1, -1)}[self.direction]
        y, x = self.y + y, self.x + x
        toggle = False
        if x < 0 or x > 9:
            x = min(max(x, 0), 9)
            self.direction = [1, 0, 3, 2][self.direction]
        if y < 0:
            y = 0
            self.direction = [3, 2, 1, 0][self.direction]
        elif self.bricks[y, x]:
            toggle = True
            if not self.strike:
                reward, self.strike = 1, True
                self.bricks[y, x] = 0
                y = self.last[0]
                self.direction = [3, 2, 1, 0][self.direction]
        elif y == 9:
            if not self.bricks.any():
                self.bricks[1:4] = 1
            if self.x == self.paddle:
                self.direction = [3, 2, 1, 0][self.direction]
                y = self.last[0]
            elif x == self.paddle:
                self.direction = [2, 3, 0, 1][self.direction]
                y = self.last[0]
            else:
                end = True
        if not toggle:
            self.strike = False
        self.y, self.x = y, x
        return reward, end

    def seen(self) -> np.ndarray:
        board = np.zeros((10, 10, 4))
        board[9, self.paddle, 0] = board[self.y, self.x, 1] = board[*self.last, 2] = 1
        board[..., 3] = self.bricks
        return board


@pytest.mark.parametrize("skill", [0.0, 0.95])
def test_breakout_is_minatars(skill):
    """With random moves, and from a wall of which little is left with those of a player who mostly follows the ball, and so comes to a new one."""
    game = make("breakout")
    step, observe, random = jax.jit(game.step), jax.jit(game.observe), np.random.default_rng(0)
    rewards, walls, ends = 0, 0, 0
    for episode in range(12):
        state = game.reset(jax.random.key(episode))
        plain = PlainBreakout(right=bool(state.ball[1] == 9))
        if skill:
            plain.bricks[:] = (plain.bricks == 1) & (random.random((10, 10)) < 0.1)
            state = state.replace(bricks=jnp.asarray(plain.bricks == 1))
        for _ in range(300):
            aim = int(np.sign(plain.x - plain.paddle)) % 3
            action = {0: 0, 1: 2, 2: 1}[aim] if random.random() < skill else int(random.integers(3))
            before = plain.bricks.sum()
            state, reward, end = step(state, jnp.asarray(action), jax.random.key(0))
            assert (float(reward), bool(end)) == plain.act(action)
            np.testing.assert_array_equal(observe(state), plain.seen())
            rewards, walls, ends = rewards + float(reward), walls + (plain.bricks.sum() > before), ends + bool(end)
            if end:
                break
    assert rewards > 5 and ends > 0 and (walls > 0) == (skill > 0)


def test_catch_rewards_who_stands_where_the_ball_comes_down():
    game = make("catch")
    step = jax.jit(game.step)
    for episode in range(20):
        state = game.reset(jax.random.key(episode))
        column, paddle, total = int(state.column), 2, 0.0
        for time in range(9):
            action = (episode * 7 + time * time) % 3
            paddle = min(max(paddle + action - 1, 0), 4)
            state, reward, end = step(state, jnp.asarray(action), jax.random.key(0))
            board = np.asarray(game.observe(state))
            assert board.sum() == 2 and board[9, paddle, 0] == 1 and board[time + 1, column, 1] == 1
            total += float(reward)
            assert bool(end) == (time == 8)
        assert total == (1 if paddle == column else -1)
