"""Why the check of a webhook request stopped: one plain sentence for each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from providers.spec import Step

WHY: Final[Mapping[Step, str]] = {
    "method_refused": "The provider posts its events; this request has another method and is no handshake.",
    "url_malformed": "The address of the request has letters that no address has, so it cannot take part in what is signed.",
    "body_malformed": "The body is not what the scheme has to read in it, JSON or a form; or it is what a handshake asks for; "
    "or it has more values than are read before anything is proven (1,000 fields of a form, 20,000 commas in JSON).",
    "body_not_signed": "The signature covers a form or a hash of the body, and the body is neither, so nothing proves it.",
    "body_mismatch": "The hash of the body is another one than the address names: the body was changed on the way.",
    "challenge_malformed": "It asks for the answer of a handshake, and what is to be answered is missing or of another form.",
    "header_missing": "The field that carries the signature, or another one that the scheme needs, is missing or empty.",
    "header_repeated": "A field that must be there once is there twice, so two readers could take different ones.",
    "member_missing": "A member of the JSON body that the scheme needs is missing.",
    "prefix_wrong": "No signature begins as the scheme writes it, such as sha256= or v1=.",
    "encoding_wrong": "A signature, or a field that the scheme reads, has letters or a length that the scheme does not write.",
    "too_many_signatures": "There are more signatures than any sender makes, so none was tried.",
    "timestamp_missing": "The time that is signed along is missing.",
    "timestamp_malformed": "The time that is signed along is not written as the scheme writes it.",
    "timestamp_stale": "The signed time is too old: a repetition of an old request, or a clock that is wrong.",
    "timestamp_ahead": "The signed time lies in the future: the clock is wrong on one of the two sides.",
    "secret_missing": "The source has no secret to check with.",
    "secret_malformed": "No secret of the source has the form that the scheme needs.",
    "setting_missing": "The source lacks a setting that the scheme needs.",
    "signature_mismatch": "No signature fits: another secret, other bytes than were signed, or another address.",
    "token_mismatch": "The token that came along is none of the source's.",
    "token_malformed": "What came as a signed token is none.",
    "algorithm_refused": "It names an algorithm that is not the scheme's; the request has no say in this.",
    "issuer_mismatch": "The signed token is by another issuer.",
    "audience_mismatch": "The signed token is for somebody else: its audience is not the source's.",
    "account_mismatch": "The signed token is of another account than the source names.",
    "key_address_refused": "It names an address for its key that is not the provider's, so nobody was asked.",
    "key_unavailable": "The key that the provider publishes could not be had.",
    "key_unknown": "It names a key that the provider does not publish.",
    "key_refused": "The key or certificate that it names is not one to trust for this.",
}
