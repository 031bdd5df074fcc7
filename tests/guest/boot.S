/* A boot sector that proves what the firmware's own virtio-blk driver reads and writes through INT 13h.
 *
 * It reads CHUNKS runs of CHUNK_SECTORS sectors from sector 1 on, folds every 32-bit word into a sum
 * (sum = rotate-left(sum, 1) xor word), writes the sum to the sector behind them, reads that back, and prints
 * "SUM xxxxxxxx" to the first serial port; "BAD xx" with the firmware's error code when something fails.
 */
#define COM1 0x3f8
#define BUFFER_SEGMENT 0x1000
    .code16
    .globl _start
_start:
    ljmp $0, $1f
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    movb %dl, drive
    movw $BUFFER_SEGMENT, %ax
    movw %ax, %es
    xorl %ebp, %ebp
    movw $CHUNKS, %di
chunk:
    movb $0x42, %ah
    call transfer
    xorw %bx, %bx
    movw $(CHUNK_SECTORS * 512 / 4), %cx
word:
    roll $1, %ebp
    xorl %es:(%bx), %ebp
    addw $4, %bx
    loop word
    addl $CHUNK_SECTORS, sector
    decw %di
    jnz chunk

    movw $1, count
    movl %ebp, %es:0
    movw $0x4300, %ax
    call transfer
    movl $0, %es:0
    movb $0x42, %ah
    call transfer
    cmpl %es:0, %ebp
    movb $0xff, %ah
    jne failed

    movw $sum_text, %si
    call print
    movl %ebp, %eax
    movw $8, %cx
    jmp print_digits

/* Runs the extended function in %ah on the packet. */
transfer:
    movb drive, %dl
    movw $packet, %si
    pushw %di
    int $0x13
    popw %di
    jc failed
    ret

failed:
    movzbl %ah, %eax
    shll $24, %eax
    pushl %eax
    movw $bad_text, %si
    call print
    popl %eax
    movw $2, %cx
print_digits:
    roll $4, %eax
    pushl %eax
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 1f
    addb $('a' - '9' - 1), %al
1:  call put
    popl %eax
    loop print_digits
    movb $'\n', %al
    call put
stop:
    hlt
    jmp stop

print:
    lodsb
    testb %al, %al
    jz 1f
    call put
    jmp print
1:  ret

put:
    movb %al, %ah
    movw $(COM1 + 5), %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %ah, %al
    movw $COM1, %dx
    outb %al, %dx
    ret

sum_text: .asciz "SUM "
bad_text: .asciz "BAD "
drive:    .byte 0
    .balign 4
packet:   .byte 16, 0
count:    .word CHUNK_SECTORS
    .word 0, BUFFER_SEGMENT
sector:   .quad 1
    .org 510
    .word 0xaa55
