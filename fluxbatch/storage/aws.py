"""AWS's settings where its own tools find them: the environment first, then the profile (``AWS_PROFILE``, or
``default``) in ``~/.aws/credentials`` and ``~/.aws/config``."""

from __future__ import annotations

import os
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider

from fluxbatch.storage.base import StorageError

# What a profile may get credentials from
_SOURCES = {"aws_access_key_id", "role_arn", "credential_process", "sso_session", "sso_start_url", "login_session"}


class Settings:
    """``endpoint`` and ``region``: None: not set. ``profile``: whose credentials count; None: those of the environment,
    or of the machine's role. Raises StorageError: no such profile, or a file that cannot be read."""

    def __init__(self) -> None:
        try:
            self._session = botocore.session.Session()
            profile = self._session.get_scoped_config()
            self.endpoint = (
                os.environ.get("AWS_ENDPOINT_URL_S3")
                or os.environ.get("AWS_ENDPOINT_URL")
                or profile.get("endpoint_url")
            )
            self.region = os.environ.get("AWS_REGION") or self._session.get_config_variable("region")
        except BotoCoreError as error:
            raise StorageError(f"~/.aws: {error}", fatal=True) from None
        counts = not _SOURCES.isdisjoint(profile) and not os.environ.get("AWS_ACCESS_KEY_ID")
        self.profile = (self._session.profile or "default") if counts else None

    def provider(self) -> Boto3CredentialProvider | None:
        """What asks the profile for keys, again whenever they expire; None: no profile counts."""
        if self.profile is None:
            return None
        try:
            return Boto3CredentialProvider(self._session)
        except (BotoCoreError, ValueError) as error:
            raise StorageError(f"profile {self.profile} in ~/.aws: {error}", fatal=True) from None

    def of_tensorstore(self) -> dict[str, Any]:
        """The same for TensorStore's driver, which looks for roles by itself, and says so."""
        given: dict[str, Any] = {"endpoint": self.endpoint, "aws_region": self.region}
        if self.profile is not None:
            variables = ("credentials_file", "config_file")
            files = {name: os.path.expanduser(self._session.get_config_variable(name)) for name in variables}
            given["aws_credentials"] = {"type": "profile", "profile": self.profile, **files}
        elif os.environ.get("AWS_ACCESS_KEY_ID"):
            given["aws_credentials"] = {"type": "environment"}
        return {name: value for name, value in given.items() if value}
