"""What an error of the S3 library means: its text has everything, and far too much of it.

The library has one class for most of what can go wrong.  What was behind it - the server's own code, the status, the
fault of the connection - stands in the text, which is taken apart here: the codes decide, and what is said to an
operator is the server's code and words or the fault's name, never the request that was sent.  Pure.
"""

from __future__ import annotations

import re

from sglang_hicache.errors import StorageError

_CODE = re.compile(r"<Code>(\w{1,80})</Code>")
_WORDS = re.compile(r"<Message>([^<]{1,200})")
#: Of one object among many that were to be deleted.
_NOT_DELETED = re.compile(r"DeleteObjects request failed for key [^\n]*: ([^\n]{1,200}) \(code: (\w{1,80})\)")
_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z ]{1,40}))?")

#: What a server says, and what it is to us.
_BY_CODE = {
    **dict.fromkeys(
        ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken", "TokenRefreshRequired",
         "InvalidSecurity", "CredentialsNotSupported", "NotSignedUp", "AccountProblem"),
        ("refused", "wrong_password"),
    ),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccessForbidden"), ("refused", "no_permission")),
    **dict.fromkeys(("NoSuchBucket", "NoSuchKey", "NoSuchUpload"), ("refused", "not_found")),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), ("refused", "clock")),
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException",
         "InvalidBucketName", "InvalidRequest", "InvalidArgument", "MethodNotAllowed", "NotImplemented",
         "EntityTooLarge", "InvalidDigest", "BadDigest", "XAmzContentSHA256Mismatch"),
        ("refused", "bad_config"),
    ),
    **dict.fromkeys(
        ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "StorageFull", "NotEnoughSpace"),
        ("no_space", "no_space"),
    ),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestTimeout", "Busy"), ("io", "timeout")),
}  # fmt: skip

#: Where a server says nothing but a status: the answer to a HEAD has no body.
_BY_STATUS = {
    "301": ("refused", "bad_config"),
    "400": ("refused", "bad_config"),
    "401": ("refused", "wrong_password"),
    "403": ("refused", "no_permission"),
    "404": ("refused", "not_found"),
    "405": ("refused", "bad_config"),
    "429": ("io", "timeout"),
    "501": ("refused", "bad_config"),
    "503": ("io", "timeout"),
    "504": ("io", "timeout"),
    "507": ("no_space", "no_space"),
}

#: It was not our store that was asked, but whoever knows whose requests they are; its answer would mislead.
_NO_KEYS = re.compile(
    r"security-credentials|/latest/api/token|/latest/meta-data|External AWS credential provider|Missing SecretAccess"
    r"|Missing AccessKeyId|Action=AssumeRole"
)

#: Which part of a certificate was wrong.
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)")

#: Where there was no answer: names out of the library's account of the fault, and what it is to us.  The first counts.
_BY_FAULT = (
    (r"Invalid\w+Response|Metadata \{|\bParse\(\s*(Version|Header|Status|TooLarge)",
     "what came is no answer of an S3 server", ("refused", "bad_config")),
    (r"NotValidYet", "the certificate is not valid yet", ("refused", "clock")),
    (r"InvalidCertificate\(|NoCertificatesPresented|AlertReceived\(|InvalidMessage\(|PeerIncompatible|PeerMisbehaved",
     "TLS failed", ("refused", "tls")),
    (r'"dns error"|failed to lookup address', "the host name is not known", ("refused", "wrong_host")),
    (r"kind: (Host|Network)Unreachable|kind: AddrNotAvailable", "there is no way to the host", ("io", "wrong_host")),
    (r"kind: ConnectionRefused", "connection refused", ("io", "refused")),
    (r"TimedOut|kind: Timeout|operation timed out", "timed out", ("io", "timeout")),
    (r"kind: Connection(Reset|Aborted)|kind: BrokenPipe|IncompleteMessage|UnexpectedEof|NoContentRange"
     r"|NotPartial|UnexpectedRange|ChannelClosed", "the connection broke off", ("io", "refused")),
    (r"BareRedirect|TooManyRedirects",
     "the server sends us elsewhere: the region is another one", ("refused", "bad_config")),
    (r"BadScheme|kind: Builder", "the address cannot be used", ("refused", "bad_config")),
)  # fmt: skip

#: What the library says of its request before it says what was wrong with it.
_REQUEST = re.compile(r"Error performing [^\n]*? - ")

#: What is told of a fault that is none of these.
_MOST_WORDS = 160


def storage_error(error: BaseException, doing: str, place: str) -> StorageError:
    """What an error of the library is to an operator and to the op that met it; `place`: without secrets."""
    text = str(error)
    said, reason, code = _judge(text)
    if not said:
        first = _REQUEST.sub("", text.splitlines()[0] if text else "")
        said = f"{type(error).__name__}: {first}"[:_MOST_WORDS]
        if "object with invalid path" in first:
            reason, code = "refused", "foreign_format"  # in a list: somebody else's, and the library cannot name it
        elif isinstance(error, ValueError):
            reason, code = "refused", "bad_config"
    return StorageError(f"S3 at {place}: cannot {doing}: {said}", reason, code)


def is_about_the_bucket(error: BaseException) -> bool:
    """Is what was not found the bucket, and not the object?"""
    return "NoSuchBucket" in _CODE.findall(str(error))[:1]


def does_not_do_ranges(error: BaseException) -> bool:
    """Did the server answer a request for a part of an object as if it were for all of it?"""
    return "source: NotPartial" in str(error)


def is_behind_the_end(error: BaseException) -> bool:
    """Does the object end before the part that was asked for?"""
    status = _STATUS.search(str(error))
    return status is not None and status[1] == "416"


def _judge(text: str) -> tuple[str, str, str]:
    """What to say, reason and code; nothing to say: the text is none that is known."""
    if _NO_KEYS.search(text):
        return "no access key that could be used was found", "refused", "wrong_password"
    one = _NOT_DELETED.search(text)
    if one:
        return (f"{one[2]} ({one[1]})", *_BY_CODE.get(one[2], ("io", "")))
    found = _CODE.search(text)
    status = _STATUS.search(text)
    words = _WORDS.search(text)
    said = " ".join(part.strip() for part in (
        " ".join(filter(None, status.groups())) if status else "", found[1] if found else "",
        f"({words[1]})" if words else "",
    ) if part)  # fmt: skip
    if found and found[1] in _BY_CODE:
        return (said, *_BY_CODE[found[1]])
    if status and status[1] in _BY_STATUS:
        return (said, *_BY_STATUS[status[1]])
    if status:
        return said, "io", ""
    for names, told, judgement in _BY_FAULT:
        if re.search(names, text):
            part = _CERTIFICATE.search(text)
            return (f"{told}: {part[1]}" if part else told, *judgement)
    return "", "io", ""
