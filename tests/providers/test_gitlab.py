"""GitLab's recorded answers: who consented."""

from __future__ import annotations

from typing import Any

import pytest

from providers.gitlab import PROVIDER, identify
from providers.spec import Account, Incoming, ProviderAnswerError
from tests.providers.dialogues import credential_at, driven, said

# https://docs.gitlab.com/api/users/#retrieve-the-current-user (shortened)
USER: dict[str, Any] = {"id": 1, "username": "john_smith", "name": "John Smith", "email": "john@good.test"}


def test_the_account_is_gitlabs_number_which_outlives_a_renamed_user() -> None:
    asked, account = driven(identify(credential_at(PROVIDER)), said(USER))
    assert account == Account("1", "john_smith", "john@good.test")
    assert [(one.method, one.url) for one in asked] == [("GET", "https://gitlab.com/api/v4/user")]
    assert asked[0].headers["Authorization"] == "Bearer the-access-token"
    assert driven(identify(credential_at(PROVIDER)), said({"id": 1}))[1] == Account("1")


@pytest.mark.parametrize("answer", [said(USER, 403), said([]), said({"id": "1"}), said({"id": True})])
def test_without_a_number_there_is_no_account(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER)), answer)


def test_without_a_token_nothing_is_asked() -> None:
    with pytest.raises(ProviderAnswerError):
        driven(identify(credential_at(PROVIDER, access_token=None)))
