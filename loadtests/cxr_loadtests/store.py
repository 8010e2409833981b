"""Results to an S3 bucket."""

from pathlib import Path
from urllib.parse import urlsplit

from cxr_loadtests.errors import LoadTestError


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://BUCKET/PREFIX`.

    Raises:
        LoadTestError: it is none.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise LoadTestError("Results go to s3://BUCKET/PREFIX.")
    return parts.netloc, parts.path.strip("/")


def upload(folder: Path, uri: str) -> list[str]:
    """Copy the files of a folder, and say where they are now.

    Credentials, region and endpoint are boto3's own: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...

    Raises:
        LoadTestError: the URI is none, or the bucket cannot be written.
    """
    bucket, prefix = split_uri(uri)
    import boto3  # noqa: PLC0415 - only where results go to S3
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    uploaded = []
    try:
        client = boto3.client("s3")
        for path in sorted(folder.iterdir()):
            key = f"{prefix}/{path.name}" if prefix else path.name
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
            uploaded.append(f"s3://{bucket}/{key}")
    except (BotoCoreError, ClientError) as error:
        raise LoadTestError(f"Cannot write to the bucket {bucket}: {type(error).__name__}.") from (
            error
        )
    return uploaded
