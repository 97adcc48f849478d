{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}

{{- define "imds-guard.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "imds-guard.selector" -}}
app.kubernetes.io/name: {{ include "imds-guard.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "imds-guard.labels" -}}
{{ include "imds-guard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "imds-guard.image" -}}
{{- $why := "image.repository is empty: no public registry has the node image; build it with packaging/build-image, push it to a registry of yours, and name it here" -}}
{{- $repository := required $why .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- /* What all containers have in common. The arguments are verbs of the image's entry point. */ -}}
{{- define "imds-guard.container" -}}
image: {{ include "imds-guard.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  runAsUser: 0
  readOnlyRootFilesystem: true
  {{- if .Values.privileged }}
  privileged: true
  {{- else }}
  privileged: false
  # Those of imds-guard.service; SYS_CHROOT to mount a BPF filesystem on the node where there is none (setns(2)).
  capabilities:
    drop: [ALL]
    add:
      - BPF
      - PERFMON
      - NET_ADMIN
      - NET_RAW
      - SYS_ADMIN
      - SYS_PTRACE
      - SETUID
      - SETGID
      - KILL
      - DAC_READ_SEARCH
      - SYS_CHROOT
  # The runtimes' default profiles forbid bpf(2), and writing below /sys.
  seccompProfile:
    type: Unconfined
  appArmorProfile:
    type: Unconfined
  {{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  - name: config
    mountPath: /etc/imds-guard
    readOnly: true
  # The locks of the commands: one command at a time, also where somebody runs imds-guard on the node itself.
  - name: run
    mountPath: /run/imds-guard
  - name: xtables-lock
    mountPath: /run/xtables.lock
  # The pins that are the lock. A BPF filesystem that is mounted on the node later appears here, too.
  - name: bpffs
    mountPath: /sys/fs/bpf
    mountPropagation: HostToContainer
  # For the compiler, whose files are gone when it ends.
  - name: tmp
    mountPath: /tmp
{{- end -}}

{{- define "imds-guard.pod" -}}
metadata:
  labels:
    {{- include "imds-guard.labels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # A change of the configuration changes this, and so is a rolling update.
    checksum/config: {{ .Values.config | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  # In another PID namespace every process of the node would count as one in a container.
  hostPID: true
  # Rules of iptables, and open connections, are those of the node's network namespace. Nothing listens, nothing connects.
  hostNetwork: true
  dnsPolicy: Default
  automountServiceAccountToken: false
  enableServiceLinks: false
  priorityClassName: {{ .Values.priorityClassName }}
  terminationGracePeriodSeconds: 10
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  initContainers:
    {{- if eq .Values.state "locked" }}
    # Ends with 0 when something is locked, also when that is the emergency lock: the lock is then degraded, and the pod
    # is not ready. Fails, and is tried again, only where nothing is locked.
    - name: lock
      args: [lock]
      {{- include "imds-guard.container" . | nindent 6 }}
    {{- else }}
    - name: unlock
      args: [unlock]
      {{- include "imds-guard.container" . | nindent 6 }}
    {{- end }}
  # There is no preStop hook: a pod can't tell its last end from an update, a drain or an eviction, and none of these
  # may open the lock. There is no liveness probe: no restart cures a degraded lock.
  containers:
    - name: guard
      args: [{{ ternary "keep" "idle" (eq .Values.state "locked") }}]
      env:
        - name: IMDS_GUARD_INTERVAL
          value: {{ .Values.intervalSeconds | quote }}
        {{- if .Values.metrics.enabled }}
        - name: IMDS_GUARD_METRICS
          value: /metrics/imds_guard.prom
        {{- end }}
      {{- include "imds-guard.container" . | nindent 6 }}
        {{- if .Values.metrics.enabled }}
        - name: metrics
          mountPath: /metrics
        {{- end }}
      {{- if eq .Values.state "locked" }}
      # Degraded is not ready: a rolling update stops at the first node on which the lock is not whole.
      readinessProbe:
        exec:
          command: [imds-guard, status]
        periodSeconds: 60
        timeoutSeconds: 30
        failureThreshold: 1
      {{- end }}
    {{- if and .Values.watch.enabled (eq .Values.state "locked") }}
    - name: watch
      args: [watch]
      {{- include "imds-guard.container" . | nindent 6 }}
    {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "imds-guard.name" . }}
    - name: run
      hostPath:
        path: /run/imds-guard
        type: DirectoryOrCreate
    - name: xtables-lock
      hostPath:
        path: /run/xtables.lock
        type: FileOrCreate
    - name: bpffs
      hostPath:
        path: /sys/fs/bpf
        type: Directory
    - name: tmp
      emptyDir:
        medium: Memory
        sizeLimit: 16Mi
    {{- if .Values.metrics.enabled }}
    - name: metrics
      hostPath:
        path: {{ .Values.metrics.directory }}
        type: DirectoryOrCreate
    {{- end }}
{{- end -}}
