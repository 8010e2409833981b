-- The tables of databases that were made before there were migrations, as SQLite has them.
-- This is never changed: it is what is out there.

CREATE TABLE api_keys (
  id VARCHAR(255) NOT NULL,
  owner VARCHAR(255) NOT NULL,
  name VARCHAR(255) NOT NULL,
  digest VARCHAR(255) NOT NULL,
  scopes VARCHAR(255) NOT NULL,
  images_per_minute INTEGER,
  created DOUBLE NOT NULL,
  expires DOUBLE,
  revoked DOUBLE,
  PRIMARY KEY (id)
);
CREATE TABLE jobs (
  id VARCHAR(255) NOT NULL,
  owner VARCHAR(255) NOT NULL,
  request_id VARCHAR(255) NOT NULL,
  trace VARCHAR(255) NOT NULL,
  created DOUBLE NOT NULL,
  expires DOUBLE NOT NULL,
  total INTEGER NOT NULL,
  cancelled BOOLEAN NOT NULL,
  PRIMARY KEY (id)
);
CREATE INDEX ix_jobs_owner ON jobs (owner);
CREATE INDEX ix_jobs_expires ON jobs (expires);
CREATE TABLE idempotency_keys (
  owner VARCHAR(255) NOT NULL,
  "key" VARCHAR(255) NOT NULL,
  fingerprint VARCHAR(255) NOT NULL,
  created DOUBLE NOT NULL,
  lease DOUBLE NOT NULL,
  answer TEXT,
  PRIMARY KEY (owner, "key")
);
CREATE TABLE job_images (
  job_id VARCHAR(255) NOT NULL,
  "index" INTEGER NOT NULL,
  state VARCHAR(16) NOT NULL,
  worker VARCHAR(255) NOT NULL,
  attempts INTEGER NOT NULL,
  not_before DOUBLE NOT NULL,
  lease DOUBLE NOT NULL,
  result TEXT,
  PRIMARY KEY (job_id, "index"),
  FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE INDEX ix_job_images_state ON job_images (state);
CREATE TABLE pending_images (
  job_id VARCHAR(255) NOT NULL,
  "index" INTEGER NOT NULL,
  data BLOB NOT NULL,
  PRIMARY KEY (job_id, "index"),
  FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
