"""Serve many requests at once over a paged key-value cache: they join and leave at any step.

    python examples/serve_paged.py

Keys and values lie in pages of one pool, shared by all requests. A request takes a page when it
needs one and gives all back when it is done (arXiv:2309.06180); every step decodes one token of
every running request in one call. The model's weights are random, so what it says means nothing;
but each answer is compared with that of torch's own attention, which reads everything anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnfast

VOCABULARY, WIDTH, H, H_KV, D, LAYERS = 64, 64, 8, 2, 16, 2
PAGES, PAGE = 16, 16


class Request:
    """What was asked, what has been said, and the pages of its keys and values."""

    def __init__(self, prompt: list[int], more: int) -> None:
        self.prompt, self.until = len(prompt), len(prompt) + more  # tokens
        self.most = -(-self.until // PAGE)  # pages
        self.tokens, self.pages = list(prompt), []


class Model(nn.Module):
    """Layers of attention, two key heads for eight query heads; `attend` is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (H + 2 * H_KV) * D) for _ in range(LAYERS))
        self.merge = nn.ModuleList(nn.Linear(H * D, WIDTH) for _ in range(LAYERS))

    def forward(self, tokens: Tensor, attend: object) -> Tensor:
        """[B, T] tokens: the logits [B, T, V] of what follows each."""
        x = self.embed(tokens)
        for i in range(LAYERS):
            heads = self.qkv[i](x).unflatten(-1, (-1, D)).transpose(1, 2)  # [B, H + 2 H_kv, T, D]
            y = attend(i, *heads.split([H, H_KV, H_KV], 1)).transpose(1, 2).flatten(2)
            x = nn.functional.rms_norm(x + self.merge[i](y), (WIDTH,))
        return x @ self.embed.weight.T


class Server:
    """The pool, who waits and who runs."""

    def __init__(self, model: Model, requests: list[Request], device: str) -> None:
        self.model, self.device = model, device
        self.waiting, self.running = list(requests), []
        self.k, self.v = torch.empty(2, LAYERS, PAGES, PAGE, H_KV, D, device=device)
        self.free, self.most = list(range(PAGES)), 0  # pages, and how many were in use at a time

    def read(self, requests: list[Request], new: list[list[int]]) -> list[int]:
        """Read the newest [B, T] of the requests' tokens: the B tokens that follow."""
        for request in requests:
            while len(request.pages) * PAGE < len(request.tokens):
                request.pages.append(self.free.pop())  # wherever it lies
        self.most = max(self.most, PAGES - len(self.free))
        rows = [r.pages + [-1] * (PAGES - len(r.pages)) for r in requests]
        table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        lengths = torch.tensor([len(r.tokens) for r in requests]).to(table)
        places = lengths[:, None] - torch.arange(len(new[0]), 0, -1, device=self.device)  # [B, T]
        page, slot = table.gather(1, places // PAGE).long(), places % PAGE

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[i][page, slot], self.v[i][page, slot] = k.transpose(1, 2), v.transpose(1, 2)
            return attnfast.decode_attention(q, self.k[i], self.v[i], lengths, page_table=table)

        logits = self.model(torch.tensor(new, device=self.device), attend)
        return logits[:, -1].argmax(-1).tolist()

    def step(self) -> None:
        """Let requests in whose pages will suffice, decode a token of each, let some go."""
        while self.waiting and sum(r.most for r in (*self.running, self.waiting[0])) <= PAGES:
            self.running.append(request := self.waiting.pop(0))
            request.tokens += self.read([request], [request.tokens])
        told = self.read(self.running, [r.tokens[-1:] for r in self.running])
        for request, token in zip(list(self.running), told, strict=True):
            request.tokens.append(token)
            if len(request.tokens) >= request.until:
                self.running.remove(request)
                self.free += request.pages


def agrees(model: Model, request: Request) -> bool:
    """Whether torch's own attention, over the whole answer at once, says the same."""
    sdpa = nn.functional.scaled_dot_product_attention
    tokens = torch.tensor([request.tokens], device=model.embed.weight.device)
    logits = model(tokens, lambda i, *qkv: sdpa(*qkv, is_causal=True, enable_gqa=True))
    return torch.equal(logits[0, request.prompt - 1 : -1].argmax(-1), tokens[0, request.prompt :])


@torch.inference_mode()
def main(requests: int = 12, longest: int = 60) -> dict[str, int]:
    """Serve and compare; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Model().to(device)
    lengths = torch.randint(1, longest // 2, (requests,)).tolist()
    asked = [Request(torch.randint(VOCABULARY, (n,)).tolist(), longest // 2) for n in lengths]
    server, steps = Server(model, asked, device), 0
    while server.waiting or server.running:
        server.step()
        steps += 1
    print(f"{requests} requests, {requests * (longest // 2)} new tokens in {steps} steps")
    print(f"pages: at most {server.most} of {PAGES} in use, {len(server.free)} free at the end")
    same = sum(agrees(model, request) for request in asked)
    print(f"the same answers as torch's attention without a cache: {same} of {requests}")
    return {"steps": steps, "most": server.most, "free": len(server.free), "same": same}


if __name__ == "__main__":
    main()
