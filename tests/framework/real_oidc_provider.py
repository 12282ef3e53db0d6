"""A certified OpenID Connect provider (oidc-provider, for Node) as a process, and how to get tokens of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx

from deploy.dev.environment import ROOT
from tests.framework.node_packages import installed

SOURCE = ROOT / "tests" / "e2e" / "oidc"
START_TIMEOUT_S = 30.0
MAX_STEPS = 12


class RealProvider:
    """Runs from `start` to `stop`; it forgets everything when it ends."""

    def __init__(self) -> None:
        self.issuer = self.audience = self._resource = self._callback = ""
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises NodeUnavailable where it cannot be had."""
        folder = await asyncio.to_thread(installed, SOURCE)
        self._process = await asyncio.create_subprocess_exec(
            "node", "provider.mjs", cwd=folder, stdin=-1, stdout=-1, stderr=asyncio.subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        said = json.loads(await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S))
        self.issuer, self.audience = said["issuer"], said["audience"]
        self._resource, self._callback = said["resource"], said["callback"]

    async def stop(self) -> None:
        """Kills it; nothing where it does not run."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def token_of_a_program(self) -> str:
        """A JWT access token (RFC 9068) of the group `programs`, by its client credentials."""
        form = {"grant_type": "client_credentials", "resource": self._resource}
        async with self._client() as client:
            answer = await client.post("/token", data=form, auth=("batch", "secret-of-batch"))
        return str(answer.raise_for_status().json()["access_token"])

    async def token_of(self, login: str) -> str:
        """The ID token of a person who signs in with a browser (code flow with PKCE): `alice`, in the
        groups staff and ml, `bob`, in staff, or somebody else, in none."""
        verifier = secrets.token_urlsafe(32)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "client_id": self.audience,
            "response_type": "code",
            "scope": "openid",
            "redirect_uri": self._callback,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        async with self._client() as client:
            code = await self._code(client, login, await client.get("/auth", params=query))
            form = {
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": self._callback,
                "code_verifier": verifier,
            }
            answer = await client.post("/token", data=form, auth=(self.audience, "secret-of-llmos"))
        return str(answer.raise_for_status().json()["id_token"])

    async def _code(self, client: httpx.AsyncClient, login: str, answer: httpx.Response) -> str:
        """Goes from page to page as a browser does: signs in, consents, and ends with the code."""
        for _ in range(MAX_STEPS):
            if answer.is_redirect:
                target = urljoin(str(answer.url), answer.headers["location"])
                if target.startswith(self._callback):
                    return parse_qs(urlsplit(target).query)["code"][0]
                answer = await client.get(target)
            else:
                answer.raise_for_status()
                prompt = "login" if 'name="login"' in answer.text else "consent"
                answer = await client.post(
                    answer.url, data={"prompt": prompt, "login": login, "password": "x"}
                )
        raise AssertionError("the provider asks without end")

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.issuer, trust_env=False, timeout=10)
